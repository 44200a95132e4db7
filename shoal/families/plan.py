"""From ModelSpec and a checkpoint's tensor names to rules; what is missing or unknown (core).

Three layouts of experts are read: a matrix per expert (hub); fused `experts.gate_up_proj
[E, 2I, D]`, the gate's rows first (transformers 5); and fused by kind, `[E, I, D]` (GGUF).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from shoal.errors import UnsupportedModel
from shoal.families.family import (
    Family,
    FfnNames,
    FfnRule,
    Role,
    TensorPlan,
    TensorRule,
    TensorSlice,
)
from shoal.model_spec import LayerSpec, ModelSpec, QkNorm, RouterKind, RouterSpec

MAX_FFN_SLICES = 16
NUM_NAMED = 8  # names that an error message spells out

# A nested text model comes under either order of the two; the bare decoder has none.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
# Buffers that old checkpoints carry; we compute the frequencies from the config.
_IGNORED = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|rope_freqs\.weight")

Naming = Callable[[str], str]


def canonical_name(name: str) -> str:
    """Return a Hugging Face tensor name without its prefix: `layers.0.self_attn.q_proj.weight`."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def slice_ffn(spec: ModelSpec, block_cols: int, requested: int | None = None) -> ModelSpec:
    """Cut the FFNs of a dense model into E always-chosen experts of I / E.

    E is the largest number up to 16 for which I / E is a multiple of block_cols, the quant block of
    down's format; `requested` overrides it. A model that has routers is returned as it is.

    Raises: UnsupportedModel if `requested` does not divide so.
    """
    if any(layer.router is not None for layer in spec.layers):
        return spec
    layers: list[LayerSpec] = []
    for layer in spec.layers:
        candidates = range(MAX_FFN_SLICES, 0, -1) if requested is None else (requested,)
        fits = [n for n in candidates if n > 0 and layer.ffn_dim % (n * block_cols) == 0]
        if requested is not None and not fits:
            raise UnsupportedModel(
                f"--ffn-slices {requested}: an FFN of width {layer.ffn_dim} does not cut into"
                f" {requested} slices of whole {block_cols}-column quant blocks"
            )
        slices = fits[0] if fits else 1
        router = RouterSpec(RouterKind.ALL, slices, slices, renormalise=False)
        layers.append(replace(layer, router=router, ffn_dim=layer.ffn_dim // slices))
    return replace(spec, layers=tuple(layers))


def plan_tensors(
    family: Family,
    spec: ModelSpec,
    shapes: Mapping[str, tuple[int, ...]],
    naming: Naming = canonical_name,
    rope_interleaved: bool = False,
) -> TensorPlan:
    """Find every tensor of the model in a checkpoint.

    Args:
        shapes: the checkpoint's tensor names and shapes, in torch order.
        naming: checkpoint name -> Hugging Face name without prefix (`gguf_naming` for GGUF).
        rope_interleaved: q and k rows lie in llama.cpp's order (GGUF architecture llama).

    Raises: UnsupportedModel listing the tensors that are missing, unknown, or of the wrong shape.
    """
    by_name: dict[str, str] = {}
    for raw in shapes:
        name = naming(raw)
        if name in by_name:
            raise UnsupportedModel(f"tensors {by_name[name]!r} and {raw!r} both stand for {name!r}")
        by_name[name] = raw
    finder = _Finder(shapes, by_name)
    tensors = _outer_rules(finder, spec)
    ffns: list[FfnRule] = []
    for index, layer in enumerate(spec.layers):
        tensors += _attention_rules(finder, spec, index, rope_interleaved)
        if layer.router is not None and layer.router.kind is not RouterKind.ALL:
            shape = (layer.router.num_experts, spec.model_dim)
            stem = f"layers.{index}.{family.expert_names.block}.gate"
            tensors.append(
                finder.rule(f"layers.{index}.router", Role.ROUTER, f"{stem}.weight", shape)
            )
        ffns += _ffn_rules(finder, family.expert_names, spec, index)
    ignored = _check_complete(family, finder, spec)
    return TensorPlan(tuple(tensors), tuple(ffns), ignored)


@dataclass(slots=True)
class _Finder:
    shapes: Mapping[str, tuple[int, ...]]
    by_name: Mapping[str, str]
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        return name in self.by_name

    def find(self, name: str, shape: tuple[int, ...]) -> TensorSlice:
        raw = self.by_name.get(name)
        if raw is None:
            self.missing.append(name)
        else:
            self.used.add(name)
            if tuple(self.shapes[raw]) != shape:
                self.misshapen.append(f"{raw} is {list(self.shapes[raw])}, not {list(shape)}")
        matrix = shape[-2:]
        cols = (0, matrix[1]) if len(matrix) == 2 else None
        return TensorSlice(raw or name, None, (0, matrix[0]), cols)

    def rule(self, ours: str, role: Role, name: str, shape: tuple[int, ...]) -> TensorRule:
        return TensorRule(ours, role, self.find(name, shape))


def _outer_rules(finder: _Finder, spec: ModelSpec) -> list[TensorRule]:
    table = (spec.vocab_size, spec.model_dim)
    rules = [
        finder.rule("embed", Role.EMBEDDING, "embed_tokens.weight", table),
        finder.rule("norm", Role.VECTOR, "norm.weight", (spec.model_dim,)),
    ]
    if not spec.tie_embeddings:
        rules.append(finder.rule("lm_head", Role.EMBEDDING, "lm_head.weight", table))
    return rules


def _attention_rules(
    finder: _Finder, spec: ModelSpec, layer: int, rope_interleaved: bool
) -> list[TensorRule]:
    attention, theirs = spec.attention, f"layers.{layer}.self_attn"
    q_dim = attention.num_heads * attention.head_dim
    kv_dim = attention.num_kv_heads * attention.head_dim
    ours = f"layers.{layer}.attention"

    def norm(name: str, source: str, dim: int) -> TensorRule:
        return finder.rule(name, Role.VECTOR, f"{source}.weight", (dim,))

    rules = [
        norm(f"{ours}.norm", f"layers.{layer}.input_layernorm", spec.model_dim),
        norm(
            f"layers.{layer}.ffn.norm", f"layers.{layer}.post_attention_layernorm", spec.model_dim
        ),
    ]
    shapes = {
        "q": (q_dim, spec.model_dim),
        "k": (kv_dim, spec.model_dim),
        "v": (kv_dim, spec.model_dim),
        "o": (spec.model_dim, q_dim),
    }
    heads = {"q": attention.num_heads, "k": attention.num_kv_heads} if rope_interleaved else {}
    for key, (rows, cols) in shapes.items():
        found = [
            finder.rule(f"{ours}.{key}", Role.MATRIX, f"{theirs}.{key}_proj.weight", (rows, cols))
        ]
        if attention.output_bias if key == "o" else attention.qkv_bias:
            bias = f"{theirs}.{key}_proj.bias"
            found.append(finder.rule(f"{ours}.{key}.bias", Role.VECTOR, bias, (rows,)))
        for rule in found:
            rules.append(replace(rule, source=replace(rule.source, rope_heads=heads.get(key, 0))))
    if attention.qk_norm is not QkNorm.NONE:
        per_head = attention.qk_norm is QkNorm.HEAD
        dims = (attention.head_dim, attention.head_dim) if per_head else (q_dim, kv_dim)
        rules.append(norm(f"{ours}.q_norm", f"{theirs}.q_norm", dims[0]))
        rules.append(norm(f"{ours}.k_norm", f"{theirs}.k_norm", dims[1]))
    return rules


def _ffn_rules(finder: _Finder, names: FfnNames, spec: ModelSpec, layer: int) -> list[FfnRule]:
    router, width = spec.layers[layer].router, spec.layers[layer].ffn_dim
    if router is None:
        return [_dense_ffn(finder, spec.model_dim, layer, width)]
    if router.kind is RouterKind.ALL:
        whole = _dense_ffn(finder, spec.model_dim, layer, width * router.num_experts)
        return [_cut_ffn(whole, index, width) for index in range(router.num_experts)]
    return _expert_rules(finder, names, spec.model_dim, layer, router.num_experts, width)


def _dense_ffn(finder: _Finder, dim: int, layer: int, width: int) -> FfnRule:
    stem = f"layers.{layer}.mlp"
    return FfnRule(
        layer,
        None,
        gate=finder.find(f"{stem}.gate_proj.weight", (width, dim)),
        up=finder.find(f"{stem}.up_proj.weight", (width, dim)),
        down=finder.find(f"{stem}.down_proj.weight", (dim, width)),
    )


def _cut_ffn(whole: FfnRule, index: int, width: int) -> FfnRule:
    part = (index * width, (index + 1) * width)
    return FfnRule(
        whole.layer,
        index,
        gate=replace(whole.gate, rows=part),
        up=replace(whole.up, rows=part),
        down=replace(whole.down, cols=part),
    )


def _expert_rules(
    finder: _Finder, names: FfnNames, dim: int, layer: int, num_experts: int, width: int
) -> list[FfnRule]:
    stem = f"layers.{layer}.{names.block}.experts"
    if finder.has(f"{stem}.gate_up_proj"):
        both = finder.find(f"{stem}.gate_up_proj", (num_experts, 2 * width, dim))
        gate, up = replace(both, rows=(0, width)), replace(both, rows=(width, 2 * width))
        down = finder.find(f"{stem}.down_proj", (num_experts, dim, width))
    elif finder.has(f"{stem}.{names.gate}.weight"):
        gate = finder.find(f"{stem}.{names.gate}.weight", (num_experts, width, dim))
        up = finder.find(f"{stem}.{names.up}.weight", (num_experts, width, dim))
        down = finder.find(f"{stem}.{names.down}.weight", (num_experts, dim, width))
    else:
        return [
            FfnRule(
                layer,
                index,
                gate=finder.find(f"{stem}.{index}.{names.gate}.weight", (width, dim)),
                up=finder.find(f"{stem}.{index}.{names.up}.weight", (width, dim)),
                down=finder.find(f"{stem}.{index}.{names.down}.weight", (dim, width)),
            )
            for index in range(num_experts)
        ]
    return [
        FfnRule(
            layer,
            index,
            gate=replace(gate, index=index),
            up=replace(up, index=index),
            down=replace(down, index=index),
        )
        for index in range(num_experts)
    ]


def _check_complete(family: Family, finder: _Finder, spec: ModelSpec) -> tuple[str, ...]:
    ignored: list[str] = []
    unknown: list[str] = []
    for name, raw in finder.by_name.items():
        if name in finder.used:
            continue
        tied_head = spec.tie_embeddings and name == "lm_head.weight"
        (ignored if tied_head or _IGNORED.fullmatch(name) else unknown).append(raw)
    problems = [
        f"{len(names)} {what}: {', '.join(names[:NUM_NAMED])}" + (", …" * (len(names) > NUM_NAMED))
        for what, names in (
            ("tensors are missing", finder.missing),
            ("tensors have another shape than the config says", finder.misshapen),
            ("tensors are unknown to this family", unknown),
        )
        if names
    ]
    if problems:
        raise UnsupportedModel(
            f"this is no {family.name} checkpoint that shoal reads: " + "; ".join(problems)
        )
    return tuple(sorted(ignored))
