"""Model families: config.json or GGUF metadata in, ModelSpec and tensor rules out.

    config = json.loads(config.json)        or  gguf = gguf_model(metadata, names), gguf.config
    family = family_of(config)              refuses others by name
    spec   = family.spec(config)
    spec   = slice_ffn(spec, block_cols)    a dense model becomes E always-chosen experts
    freq   = family.inv_freq(config)
    plan   = plan_tensors(family, spec, shapes [, gguf.naming, gguf.rope_interleaved])

`shapes` maps the checkpoint's tensor names to their shapes in torch order; the plan names for each
of our tensors the rectangle of the checkpoint that holds it, or an error lists what is missing,
unknown or of the wrong shape. A further family is a page beside llama.py and a line in FAMILIES.
"""

from collections.abc import Mapping
from typing import Any

from shoal.errors import UnsupportedModel
from shoal.families.family import (
    Family,
    FfnNames,
    FfnRule,
    Role,
    TensorPlan,
    TensorRule,
    TensorSlice,
    rope_row_order,
)
from shoal.families.gguf_names import GGUF_ARCHITECTURES, GgufModel, gguf_model
from shoal.families.llama import Llama
from shoal.families.mixtral import Mixtral
from shoal.families.olmoe import Olmoe
from shoal.families.plan import plan_tensors, slice_ffn
from shoal.families.qwen3_moe import Qwen3Moe

__all__ = [
    "FAMILIES",
    "GGUF_ARCHITECTURES",
    "Family",
    "FfnNames",
    "FfnRule",
    "GgufModel",
    "Role",
    "TensorPlan",
    "TensorRule",
    "TensorSlice",
    "family_of",
    "gguf_model",
    "plan_tensors",
    "rope_row_order",
    "slice_ffn",
]

FAMILIES: tuple[Family, ...] = (Llama(), Mixtral(), Qwen3Moe(), Olmoe())


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that config.json names by `model_type` or `architectures`.

    Raises: UnsupportedModel naming the model type and listing ours.
    """
    model_type = config.get("model_type")
    listed = config.get("architectures")
    architectures = listed if isinstance(listed, list) else []
    for family in FAMILIES:
        if model_type == family.name:
            return family
        if model_type is None and any(name in family.architectures for name in architectures):
            return family
    named = model_type or ", ".join(map(str, architectures)) or "config.json names none"
    known = ", ".join(family.name for family in FAMILIES)
    raise UnsupportedModel(f"model type {named!r} is not supported: shoal runs {known}")
