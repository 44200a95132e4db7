"""Artifacts as an earlier convert wrote them: without pre-gate matrices."""

from dataclasses import replace
from pathlib import Path

from shoal.artifact import Artifact, encode_manifest
from shoal.artifact.pregate import PREGATE_FILE


def without_pregates(source: Path, out: Path) -> Artifact:
    """Return a copy of an artifact that has none; its other files are links."""
    artifact = Artifact.open(source)
    out.mkdir()
    for path in source.iterdir():
        if path.name not in (PREGATE_FILE, "manifest.json"):
            (out / path.name).symlink_to(path)
    manifest = replace(artifact.manifest, pregates=())
    (out / "manifest.json").write_bytes(encode_manifest(manifest))
    return Artifact.open(out)
