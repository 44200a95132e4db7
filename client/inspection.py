"""What `shoal inspect` says of an artifact: as a dict, and as tables of it."""

from typing import Any

from rich.table import Table

from shoal.artifact import Artifact
from shoal.artifact.shadow import SHADOW_FORMATS, find_shadow
from shoal.experts.ownership import Ownership

_EXPERT_COLUMNS = (
    *("layers", "experts", "a token", "width", "gate, up", "down"),
    *("grid", "bytes each", "here"),
)


def summarise(artifact: Artifact) -> dict[str, Any]:
    """Return the artifact's description, as `--json` prints it."""
    manifest, spec, attention = artifact.manifest, artifact.spec, artifact.spec.attention
    return {
        "name": artifact.name,
        "path": str(artifact.path),
        "identity": artifact.identity,
        "shadow_of": manifest.shadow_of,
        "shadows": [name for name in SHADOW_FORMATS if find_shadow(artifact, name) is not None],
        "family": spec.family,
        "source": manifest.source,
        "quantisation": manifest.quantisation,
        "is_whole": manifest.is_whole,
        "has_dense": manifest.has_dense,
        "model_dim": spec.model_dim,
        "num_layers": spec.num_layers,
        "vocab_size": spec.vocab_size,
        "max_context": spec.max_context,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "tie_embeddings": spec.tie_embeddings,
        "dense_bytes": sum(tensor.num_bytes for tensor in manifest.dense),
        "expert_bytes": sum(e.num_experts * e.expert_bytes for e in manifest.experts),
        "bytes_here": sum(artifact.file_sizes().values()),
        "experts": [_expert_summary(artifact, entry.layer) for entry in manifest.experts],
        "files": [file.name for file in manifest.files if file.present],
        "notes": list(manifest.notes),
    }


def tensor_list(artifact: Artifact) -> list[dict[str, Any]]:
    """Return name, kind, format, shape, bytes and hash of every dense tensor."""
    return [
        {
            "name": tensor.name,
            "kind": tensor.slot.kind.value,
            "format": tensor.format.label,
            "down_format": tensor.down.label if tensor.down is not None else None,
            "shape": list(tensor.slot.shape),
            "bytes": tensor.num_bytes,
            "blake3": tensor.blake3,
        }
        for tensor in artifact.manifest.dense
    ]


def _expert_summary(artifact: Artifact, layer: int) -> dict[str, Any]:
    entry, router = artifact.expert_layer(layer), artifact.spec.layers[layer].router
    assert router is not None
    here = artifact.owned_experts.get(layer, ())
    return {
        "layer": layer,
        "num_experts": entry.num_experts,
        "experts_per_token": router.experts_per_token,
        "router": router.kind.value,
        "ffn_dim": entry.weights.ffn_dim,
        "gate_up": entry.weights.gate_up.label,
        "down": entry.weights.down.label,
        "scheme": entry.weights.scheme.name.lower(),
        "grid": entry.grid,
        "bytes_each": entry.expert_bytes,
        "here": str(Ownership({layer: here})) if here else "none",
        "num_here": len(here),
    }


def overview(summary: dict[str, Any]) -> Table:
    """Return the geometry and sizes of a `summarise` as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    kind = "whole" if summary["is_whole"] else "shadow" if summary["shadow_of"] else "slice"
    part = (
        ""
        if summary["is_whole"]
        else (", dense part here" if summary["has_dense"] else ", dense part not here")
    )
    rows = {
        "model": f"{summary['name']} ({summary['family']}, from {summary['source']})",
        "identity": summary["identity"],
        **({"shadow of": summary["shadow_of"]} if summary["shadow_of"] else {}),
        "path": summary["path"],
        "part": f"{kind}{part}, {summary['bytes_here']:,} bytes",
        "weights": f"{summary['quantisation']}: dense {summary['dense_bytes']:,} bytes,"
        f" experts {summary['expert_bytes']:,} bytes",
        "layers": f"{summary['num_layers']} of width {summary['model_dim']},"
        f" {summary['num_heads']} heads of {summary['head_dim']},"
        f" {summary['num_kv_heads']} for keys and values",
        "vocabulary": f"{summary['vocab_size']:,} tokens, context {summary['max_context']:,}",
        "files": ", ".join(summary["files"]) or "no text files here",
        **({"shadows": ", ".join(summary["shadows"])} if summary["shadows"] else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def expert_table(summary: dict[str, Any]) -> Table:
    """Return the layers of a `summarise` as a table, equal ones in one row."""
    table = Table(box=None, pad_edge=False)
    for column in _EXPERT_COLUMNS:
        table.add_column(column)
    groups: list[tuple[list[int], tuple[str, ...]]] = []
    for entry in summary["experts"]:
        cells: tuple[str, ...] = (
            str(entry["num_experts"]),
            str(entry["experts_per_token"]),
            str(entry["ffn_dim"]),
            entry["gate_up"],
            entry["down"],
            str(entry["grid"]),
            f"{entry['bytes_each']:,}",
            f"{entry['num_here']} of {entry['num_experts']}",
        )
        if groups and groups[-1][1] == cells:
            groups[-1][0].append(entry["layer"])
        else:
            groups.append(([entry["layer"]], cells))
    for layers, cells in groups:
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        table.add_row(span, *cells)
    return table


def tensor_table(tensors: list[dict[str, Any]]) -> Table:
    """Return what `tensor_list` says as a table."""
    table = Table(box=None, pad_edge=False)
    for column in ("tensor", "format", "shape", "bytes"):
        table.add_column(column)
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"]))
        table.add_row(tensor["name"], tensor["format"], shape, f"{tensor['bytes']:,}")
    return table
