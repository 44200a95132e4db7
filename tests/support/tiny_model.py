"""A tiny random artifact: the checkpoint of support.checkpoints, converted by the real convert."""

from pathlib import Path
from typing import Any

from client.convert.pipeline import Options, convert, make_plan
from client.convert.safetensors_source import SafetensorsSource
from shoal.quant import parse_format
from support.checkpoints import tiny_config, write_checkpoint


def make_tiny_artifact(
    tmp: Path,
    family: str = "qwen3_moe",
    quant: str | None = "f32",
    seed: int = 0,
    *,
    name: str = "tiny",
    dtype: str = "f32",
    **geometry: Any,
) -> Path:
    """Write a random checkpoint of `family` and convert it; return the artifact's folder.

    Args:
        quant: format label, or None for the checkpoint's own.
        dtype: of the checkpoint: f32, f16 or bf16.
        geometry: changes to config.json, such as hidden_size=96 or num_hidden_layers=2.
    """
    folder = tmp / f"{name}-checkpoint"
    write_checkpoint(folder, tiny_config(family, **geometry), seed, dtype=dtype)
    options = Options(quant=parse_format(quant) if quant is not None else None)
    out = tmp / f"{name}.shoal"
    convert(make_plan(SafetensorsSource(folder), options), out, lambda _num_bytes: None)
    return out
