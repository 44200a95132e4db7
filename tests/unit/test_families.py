"""Families: configs of both styles become one spec; every tensor has its place or is named."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UnsupportedModel
from shoal.families import (
    FAMILIES,
    Family,
    Role,
    TensorPlan,
    family_of,
    gguf_model,
    plan_tensors,
    rope_row_order,
    slice_ffn,
)
from shoal.model_spec import ModelSpec, QkNorm, RouterKind
from support.checkpoints import checkpoint_shapes, tiny_config

Shapes = dict[str, tuple[int, ...]]


def _spec(family: str, **changes: Any) -> ModelSpec:
    config = tiny_config(family, **changes)
    return family_of(config).spec(config)


def _plan(family: str, shapes: Shapes, **changes: Any) -> TensorPlan:
    config = tiny_config(family, **changes)
    return plan_tensors(family_of(config), slice_ffn(_spec(family, **changes), 1), shapes)


def _shapes(family: str, fused: bool = False, **changes: Any) -> Shapes:
    shapes = checkpoint_shapes(tiny_config(family, **changes), fused)
    return {name if name == "lm_head.weight" else f"model.{name}": s for name, s in shapes.items()}


def test_a_model_type_that_is_not_ours_is_named_beside_those_that_are() -> None:
    with pytest.raises(UnsupportedModel, match="'bloom' is not supported: shoal runs llama"):
        family_of({"model_type": "bloom"})
    with pytest.raises(UnsupportedModel, match=r"config\.json names none"):
        family_of({})
    assert family_of({"architectures": ["OlmoeForCausalLM"]}).name == "olmoe"


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_both_styles_of_config_give_the_same_spec_and_frequencies(family: str) -> None:
    old = tiny_config(family, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    new = tiny_config(family, rope_theta=..., torch_dtype=..., dtype="f32", rope_parameters=rope)
    page = family_of(old)
    assert page.spec(old) == page.spec(new)
    assert page.inv_freq(old).tobytes() == page.inv_freq(new).tobytes()
    assert page.spec({"text_config": old}) == page.spec(old)


def test_a_null_head_dim_is_the_width_over_the_heads() -> None:
    assert _spec("mixtral", head_dim=None).attention.head_dim == 16
    assert _spec("mixtral", head_dim=24).attention.head_dim == 24
    assert _spec("mixtral", head_dim=24).rotary_dim == 24


def test_what_each_family_says_of_its_attention_and_router() -> None:
    mixtral, olmoe = _spec("mixtral", sliding_window=7), _spec("olmoe", clip_qkv=8.0)
    assert mixtral.layers[0].router is not None and mixtral.layers[0].router.renormalise
    assert mixtral.layers[0].window == 7 and mixtral.attention.qk_norm is QkNorm.NONE
    assert olmoe.layers[0].router is not None and not olmoe.layers[0].router.renormalise
    assert olmoe.attention.qk_norm is QkNorm.PROJECTION and olmoe.attention.clip_qkv == 8.0
    biased = _spec("qwen3_moe", attention_bias=True).attention
    assert biased.qk_norm is QkNorm.HEAD and biased.qkv_bias and biased.output_bias


def test_qwen3_moe_has_dense_layers_where_the_config_says() -> None:
    def sparse(**changes: Any) -> list[bool]:
        layers = _spec("qwen3_moe", num_hidden_layers=6, **changes).layers
        assert all(layer.ffn_dim == (160 if layer.router is None else 64) for layer in layers)
        return [layer.router is not None for layer in layers]

    assert sparse(mlp_only_layers=[0, 4]) == [False, True, True, True, False, True]
    assert sparse(decoder_sparse_step=2) == [False, True] * 3
    assert sparse(decoder_sparse_step=3, mlp_only_layers=[2]) == [False] * 5 + [True]


def test_qwen3_moe_slides_only_if_told_to() -> None:
    assert _spec("qwen3_moe", sliding_window=9).layers[0].window is None
    slides = _spec("qwen3_moe", sliding_window=9, use_sliding_window=True)
    assert slides.layers[0].window == 9


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama", {"hidden_size": "64"}, "hidden_size = '64': must be an integer"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0: must be an integer >= 1"),
        ("llama", {"num_hidden_layers": 10**6}, "at most 1024"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"num_key_value_heads": 3}, "do not share 3 key heads"),
        ("llama", {"head_dim": 15}, "RoPE needs an even number"),
        ("llama", {"num_attention_heads": 128}, "head_dim = 0: RoPE needs"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "only full_attention"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised ('fp8')"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not implemented"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9: at most 8"),
        ("mixtral", {"num_local_experts": 5000}, "at most 4096"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob = 1: must be true or false"),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_field(
    family: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        _spec(family, **changes)
    assert named in str(refusal.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**7) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@given(st.sampled_from(FAMILIES), st.data())
def test_a_config_of_any_values_is_read_or_refused(family: Family, data: st.DataObject) -> None:
    config = tiny_config(family.name, rope_scaling=None, sliding_window=None, clip_qkv=None)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
        config[key] = data.draw(_JSON)
    try:
        family_of(config)
        assert family.spec(config).num_layers > 0
    except UnsupportedModel as refusal:
        assert str(refusal)


@given(st.sampled_from(["llama", "qwen3moe", "olmoe"]), st.data())
def test_gguf_metadata_of_any_values_are_read_or_refused(
    architecture: str, data: st.DataObject
) -> None:
    metadata = _gguf_metadata(architecture, **EXPERTS, expert_feed_forward_length=48)
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), max_size=2)):
        metadata[key] = data.draw(_JSON)
    try:
        _gguf_plan(metadata, _gguf_shapes(experts=4))
    except UnsupportedModel as refusal:
        assert str(refusal)


def test_a_dense_ffn_is_cut_into_the_most_slices_of_whole_quant_blocks() -> None:
    def slices(width: int, block_cols: int, requested: int | None = None) -> tuple[int, int]:
        layer = slice_ffn(_spec("llama", intermediate_size=width), block_cols, requested).layers[0]
        assert layer.router is not None and layer.router.kind is RouterKind.ALL
        assert layer.router.experts_per_token == layer.router.num_experts
        return layer.router.num_experts, layer.ffn_dim

    assert slices(1536, 32) == (16, 96)
    assert slices(1536, 256) == (6, 256)
    assert slices(80, 32) == (1, 80)
    assert slices(11008, 32) == (8, 1376)
    assert slices(1536, 32, requested=48) == (48, 32)
    with pytest.raises(UnsupportedModel, match="--ffn-slices 5"):
        slices(1536, 32, requested=5)
    with pytest.raises(UnsupportedModel, match="--ffn-slices 0"):
        slices(1536, 32, requested=0)
    sparse = _spec("qwen3_moe", mlp_only_layers=[0])
    assert slice_ffn(sparse, 32) is sparse


def test_slices_of_an_ffn_cover_it_once() -> None:
    plan = _plan("llama", _shapes("llama"))
    first = [ffn for ffn in plan.ffns if ffn.layer == 0]
    assert [ffn.gate.rows for ffn in first] == [(8 * i, 8 * i + 8) for i in range(16)]
    assert [ffn.down.cols for ffn in first] == [ffn.up.rows for ffn in first]
    assert {ffn.down.rows for ffn in first} == {(0, 64)} and first[3].name == "layers.0.experts.3"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_fused_and_single_experts_are_found(family: str) -> None:
    single = _plan(family, _shapes(family)).ffns
    fused = _plan(family, _shapes(family, fused=True)).ffns
    assert [ffn.name for ffn in single] == [ffn.name for ffn in fused]
    width = single[0].ffn_dim
    for one, both in zip(single, fused, strict=True):
        assert both.gate.index == both.up.index == both.down.index == one.index
        assert both.gate.rows == (0, width) and both.up.rows == (width, 2 * width)
        assert one.gate.rows == one.up.rows == (0, width) and one.gate.tensor != one.up.tensor


def test_mixtrals_w1_is_gate_w3_is_up_and_w2_is_down() -> None:
    ffn = _plan("mixtral", _shapes("mixtral")).ffns[0]
    names = [part.tensor.split(".")[-2] for part in (ffn.gate, ffn.up, ffn.down)]
    assert names == ["w1", "w3", "w2"]


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_prefixes_are_stripped(prefix: str) -> None:
    shapes = {prefix + name: s for name, s in checkpoint_shapes(tiny_config("olmoe")).items()}
    plan = _plan("olmoe", shapes)
    embed = next(rule for rule in plan.tensors if rule.name == "embed")
    assert embed.source.tensor == f"{prefix}embed_tokens.weight"
    assert {rule.role for rule in plan.tensors} == set(Role)


def test_missing_unknown_and_misshapen_tensors_are_all_named() -> None:
    shapes = _shapes("qwen3_moe")
    del shapes["model.layers.2.mlp.experts.3.up_proj.weight"]
    shapes["model.layers.0.self_attn.q_norm.weight"] = (64,)
    shapes["model.layers.0.mlp.shared_expert.up_proj.weight"] = (64, 64)
    with pytest.raises(UnsupportedModel) as refusal:
        _plan("qwen3_moe", shapes)
    message = str(refusal.value)
    assert "missing: layers.2.mlp.experts.3.up_proj.weight" in message
    assert "model.layers.0.self_attn.q_norm.weight is [64], not [32]" in message
    assert "unknown to this family: model.layers.0.mlp.shared_expert.up_proj.weight" in message


def test_frequency_buffers_and_a_tied_head_are_ignored_and_listed() -> None:
    shapes = _shapes("llama", tie_word_embeddings=True)
    extra: Shapes = {"model.layers.1.self_attn.rotary_emb.inv_freq": (8,), "lm_head.weight": (1, 1)}
    plan = _plan("llama", shapes | extra, tie_word_embeddings=True)
    assert plan.ignored == tuple(sorted(extra))
    assert "lm_head" not in {rule.name for rule in plan.tensors}


def _gguf_metadata(architecture: str, **keys: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "embedding_length": 64,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 256,
        "vocab_size": 40,
        "feed_forward_length": 96,
    } | keys
    metadata = {f"{architecture}.{key}": value for key, value in values.items() if value is not ...}
    return {"general.architecture": architecture} | metadata


def _gguf_shapes(head_dim: int = 16, norms: int = 0, experts: int = 0, width: int = 96) -> Shapes:
    shapes: Shapes = {
        "token_embd.weight": (40, 64),
        "output_norm.weight": (64,),
        "output.weight": (40, 64),
    }
    for layer in range(2):
        stem = f"blk.{layer}"
        shapes |= {f"{stem}.attn_norm.weight": (64,), f"{stem}.ffn_norm.weight": (64,)}
        shapes |= {f"{stem}.attn_{k}.weight": (n * head_dim, 64) for k, n in (("q", 4), ("k", 2))}
        shapes[f"{stem}.attn_v.weight"] = (2 * head_dim, 64)
        shapes[f"{stem}.attn_output.weight"] = (64, 4 * head_dim)
        if norms:
            shapes |= {
                f"{stem}.attn_q_norm.weight": (norms,),
                f"{stem}.attn_k_norm.weight": (norms,),
            }
        tail, lead = ("_exps", (experts,)) if experts else ("", ())
        if experts:
            shapes[f"{stem}.ffn_gate_inp.weight"] = (experts, 64)
        shapes |= {f"{stem}.ffn_{k}{tail}.weight": (*lead, width, 64) for k in ("gate", "up")}
        shapes[f"{stem}.ffn_down{tail}.weight"] = (*lead, 64, width)
    return shapes


def _gguf_plan(metadata: dict[str, Any], shapes: Shapes) -> tuple[ModelSpec, TensorPlan]:
    gguf = gguf_model(metadata, shapes)
    family = family_of(gguf.config)
    spec = slice_ffn(family.spec(gguf.config), 32)
    return spec, plan_tensors(family, spec, shapes, gguf.naming, gguf.rope_interleaved)


def test_a_dense_gguf_is_llama_with_its_q_and_k_in_llama_cpps_order() -> None:
    spec, plan = _gguf_plan(_gguf_metadata("llama"), _gguf_shapes())
    assert spec.family == "llama" and len(plan.ffns) == 2 * 3
    heads = {rule.name.split(".")[-1]: rule.source.rope_heads for rule in plan.tensors}
    assert (heads["q"], heads["k"], heads["v"], heads["o"]) == (4, 2, 0, 0)


def test_a_gguf_without_an_output_matrix_is_tied() -> None:
    shapes = _gguf_shapes()
    del shapes["output.weight"]
    assert _gguf_plan(_gguf_metadata("llama"), shapes)[0].tie_embeddings


EXPERTS = {"expert_count": 4, "expert_used_count": 2}


def test_a_llama_gguf_with_experts_is_mixtral() -> None:
    spec, plan = _gguf_plan(_gguf_metadata("llama", **EXPERTS), _gguf_shapes(experts=4))
    router = spec.layers[0].router
    assert spec.family == "mixtral" and router is not None and router.renormalise
    assert plan.ffns[5].name == "layers.1.experts.1"
    assert plan.ffns[5].gate.tensor == "blk.1.ffn_gate_exps.weight" and plan.ffns[5].gate.index == 1


def test_experts_of_old_gguf_files_lie_one_by_one() -> None:
    shapes = _gguf_shapes(experts=4)
    for layer in range(2):
        for kind in ("gate", "up", "down"):
            shape = shapes.pop(f"blk.{layer}.ffn_{kind}_exps.weight")[1:]
            shapes |= {f"blk.{layer}.ffn_{kind}.{e}.weight": shape for e in range(4)}
    _, plan = _gguf_plan(_gguf_metadata("llama", **EXPERTS), shapes)
    assert plan.ffns[6].down.tensor == "blk.1.ffn_down.2.weight" and plan.ffns[6].down.index is None


def test_qwen3moe_and_olmoe_ggufs_differ_in_norms_and_renormalisation() -> None:
    keys = EXPERTS | {"attention.key_length": 32, "expert_feed_forward_length": 48}
    shapes = _gguf_shapes(head_dim=32, norms=32, experts=4, width=48)
    qwen, plan = _gguf_plan(_gguf_metadata("qwen3moe", **keys), shapes)
    assert qwen.layers[0].router is not None and qwen.layers[0].router.renormalise
    assert qwen.layers[0].ffn_dim == 48 and qwen.attention.qk_norm is QkNorm.HEAD
    assert all(rule.source.rope_heads == 0 for rule in plan.tensors)
    wide = _gguf_shapes(norms=64, experts=4) | {
        f"blk.{layer}.attn_{key}.weight": (64, 64) for layer in range(2) for key in "kv"
    }
    keys = EXPERTS | {"attention.head_count_kv": 4}
    olmoe, _ = _gguf_plan(_gguf_metadata("olmoe", **keys), wide)
    assert olmoe.layers[0].router is not None and not olmoe.layers[0].router.renormalise
    assert olmoe.attention.qk_norm is QkNorm.PROJECTION


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        ("gemma3", {}, "'gemma3' is not supported: shoal reads llama, qwen3moe, olmoe"),
        ("llama", {"embedding_length": ...}, "llama.embedding_length is missing"),
        ("llama", {"rope.scaling.type": "yarn"}, "'yarn' is not implemented"),
        ("llama", {"rope.dimension_count": 8}, "over a part of the head"),
        ("llama", {"attention.value_length": 8}, "keys and values of different length"),
        ("llama", {"attention.head_count_kv": [2, 4]}, "different numbers of heads"),
        ("llama", EXPERTS | {"expert_gating_func": 2}, "only softmax routers"),
        ("llama", EXPERTS | {"expert_shared_count": 1}, "shared experts"),
    ],
)
def test_a_gguf_that_cannot_be_run_is_refused_by_name(
    architecture: str, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        _gguf_plan(_gguf_metadata(architecture, **keys), _gguf_shapes())
    assert named in str(refusal.value)


def test_an_unknown_gguf_tensor_is_named() -> None:
    shapes = _gguf_shapes() | {"blk.0.attn_sinks.weight": (4,)}
    with pytest.raises(UnsupportedModel, match=r"unknown to this family: blk\.0\.attn_sinks"):
        _gguf_plan(_gguf_metadata("llama"), shapes)


def test_the_row_order_undoes_llama_cpps_permutation() -> None:
    heads, head_dim = 3, 8
    ours = np.arange(heads * head_dim)
    # convert_hf_to_gguf.py: reshape(heads, 2, head_dim / 2).swapaxes(1, 2)
    theirs = ours.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert (theirs[rope_row_order(ours.size, heads)] == ours).all()
