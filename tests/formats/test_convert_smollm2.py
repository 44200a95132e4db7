"""The real SmolLM2 becomes an artifact without loss, in bounded memory, always the same one."""

import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

from shoal import ops
from shoal.artifact import Artifact
from shoal.families import rope_row_order
from shoal.model_spec import RouterKind
from shoal.quant import Format
from support.smollm2 import smollm2_gguf

pytestmark = [pytest.mark.weights, pytest.mark.processes]

# A new value means that every user must convert again: change it with the format version.
IDENTITY = "7121550da5b886924f6ccbdf96bc045228c01b5513aa9ce05558a559f03b4775"
ALLOWED_BYTES = 1000 * 10**6  # anonymous memory: the gguf library holds the vocabulary

_CONVERT = """
import resource, sys
from client.cli import main
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    source = smollm2_gguf()
    out = tmp_path_factory.mktemp("smollm2") / "smollm2.shoal"
    limit = ALLOWED_BYTES if sys.platform == "linux" else -1  # RLIMIT_DATA counts mappings there
    subprocess.run(
        [sys.executable, "-c", _CONVERT, str(limit), str(source), str(out)],
        check=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    return Artifact.open(out)


def test_its_identity_never_changes(artifact: Artifact) -> None:
    assert artifact.identity == IDENTITY


def test_it_is_sixteen_always_chosen_experts_a_layer_in_the_files_own_format(
    artifact: Artifact,
) -> None:
    assert artifact.spec.num_layers == 30
    for index, layer in enumerate(artifact.spec.layers):
        router = layer.router
        assert router is not None and router.kind is RouterKind.ALL
        assert (router.num_experts, layer.ffn_dim) == (16, 96)
        layout = artifact.expert_layout(index)
        assert (layout.gate_up, layout.down) == (Format.Q4_1, Format.Q4_1)
    assert artifact.matrix("embed").format is Format.Q8_0
    assert artifact.manifest.notes == ()


def test_its_blocks_mean_what_they_meant_in_the_file(artifact: Artifact) -> None:
    from gguf.quants import dequantize

    theirs = {tensor.name: tensor for tensor in GGUFReader(smollm2_gguf()).tensors}
    for ours, name, heads in (
        ("layers.0.attention.q", "blk.0.attn_q.weight", 9),
        ("layers.29.attention.k", "blk.29.attn_k.weight", 3),
        ("layers.7.attention.v", "blk.7.attn_v.weight", 0),
    ):
        found = theirs[name]
        wanted = dequantize(np.asarray(found.data), found.tensor_type)
        if heads:
            wanted = wanted[rope_row_order(len(wanted), heads)]
        np.testing.assert_array_equal(ops.unpack_matrix(artifact.matrix(ours)), wanted)
