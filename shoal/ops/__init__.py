"""All arithmetic on the path from ids to tokens: typed fronts of the native kernels.

The only package that imports shoal._kernels. SHOAL_ISA (scalar, avx2, avx512) chooses the kernels
at import; without it the fastest that this CPU has. Results are the same bits with each.
"""

from shoal.ops.combine import (
    finish_sums,
    pack_bf16,
    pack_sums,
    unpack_add_bf16,
    unpack_add_sums,
)
from shoal.ops.expert_tables import ExpertTable, expert_table
from shoal.ops.floats import (
    add,
    attention,
    clamp,
    kv_shape,
    kv_write,
    rms_norm,
    rope,
    rope_table,
    route,
)
from shoal.ops.matrices import (
    ExpertLayout,
    Matrix,
    aligned_empty,
    available_isas,
    check_finite,
    choose_isa_from_environment,
    embed,
    expert_ffn,
    expert_sums,
    isa,
    matmul,
    num_threads,
    pack_expert,
    pack_matrix,
    pack_rows,
    quantise_q4_k,
    quantise_rows,
    quantise_table,
    set_isa,
    set_threads,
    unpack_expert,
    unpack_matrix,
)
from shoal.ops.sampling import SamplingParams, logprob_of, sample, top_logprobs

__all__ = [
    "ExpertLayout",
    "ExpertTable",
    "Matrix",
    "SamplingParams",
    "add",
    "aligned_empty",
    "attention",
    "available_isas",
    "check_finite",
    "clamp",
    "embed",
    "expert_ffn",
    "expert_sums",
    "expert_table",
    "finish_sums",
    "isa",
    "kv_shape",
    "kv_write",
    "logprob_of",
    "matmul",
    "num_threads",
    "pack_bf16",
    "pack_expert",
    "pack_matrix",
    "pack_rows",
    "pack_sums",
    "quantise_q4_k",
    "quantise_rows",
    "quantise_table",
    "rms_norm",
    "rope",
    "rope_table",
    "route",
    "sample",
    "set_isa",
    "set_threads",
    "top_logprobs",
    "unpack_add_bf16",
    "unpack_add_sums",
    "unpack_expert",
    "unpack_matrix",
]

choose_isa_from_environment()
