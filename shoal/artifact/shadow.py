"""Shadows: coarser copies of a model's experts, kept where the model's own experts are not.

A shadow is an artifact with experts only. Its manifest says whose it is (`shadow_of`), its formats,
grids, hashes and identity are its own. It lies in its model's folder, or, where nothing can or
should be written there, under `$SHOAL_HOME/shadows`:

    NAME.shoal/shadows/q4.shoal        NAME-<start of the identity>-q4.shoal

It drafts, or stands in for experts that are far away; no token ever depends on it where the target
verifies. docs/shadow.md has the formats, how they were chosen and what they cost.
"""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from shoal.artifact.manifest import MANIFEST_NAME, Manifest
from shoal.artifact.reader import Artifact
from shoal.artifact.shadow_build import make_shadow, shadow_bytes
from shoal.errors import ArtifactError, CorruptArtifact, UsageError
from shoal.paths import SHADOWS_DIR, SUFFIX, default_model, resolve_model, shoal_home
from shoal.quant import Format

SHADOW_FORMATS = {"q4": Format.Q4_T, "q3": Format.Q3_T}

# (what is done, bytes in all) -> the context in which bytes done are told
ShowProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def shadow_format(name: str) -> Format:
    """Return the format that a shadow of that name has. Raises UsageError for others."""
    if name not in SHADOW_FORMATS:
        raise UsageError(
            f"no shadow format {name!r}: {' or '.join(SHADOW_FORMATS)} (with fewer than 3 bits a"
            " weight a shadow guesses no better than chance)"
        )
    return SHADOW_FORMATS[name]


def shadow_name(shadow: Manifest) -> str:
    """Return `q3` or `q4`, or the label of the format where it is neither."""
    return next((n for n, f in SHADOW_FORMATS.items() if f.label == shadow.quantisation), "") or (
        shadow.quantisation
    )


def expert_bytes(manifest: Manifest) -> int:
    """Return the bytes of all experts of a model or shadow, wherever they are."""
    return sum(layer.num_experts * layer.expert_bytes for layer in manifest.experts)


def has_all_experts(manifest: Manifest) -> bool:
    """Return whether the bytes of every expert are in the artifact's folder."""
    return all(layer.present == ((0, layer.num_experts - 1),) for layer in manifest.experts)


def shadow_place(target: Artifact, name: str) -> Path:
    """Return where the target's shadow of that name is written."""
    beside, at_home = _places(target, name)
    is_bundled = target.path.resolve().parent == default_model().resolve().parent
    return at_home if is_bundled or not os.access(target.path, os.W_OK) else beside


def find_shadow(target: Artifact, name: str) -> Path | None:
    """Return where the target's shadow of that name is, or None."""
    places = _places(target, name)
    return next((place for place in places if (place / MANIFEST_NAME).is_file()), None)


def open_shadow(target: Artifact, name_or_path: str) -> Artifact:
    """Open the target's shadow.

    Args:
        name_or_path: `q3` or `q4`: the one of that format in the model's folder (or at home); else
            the path or name of one.

    Returns:
        An artifact that has every expert of the target, and nothing else. Each is checked against
        its hash when it is read.

    Raises:
        UsageError: there is none; says how to make it.
        ArtifactError: it is no shadow, another model's, or only a part of one.
        CorruptArtifact: a file is missing or truncated; names it.
    """
    if name_or_path in SHADOW_FORMATS:
        found = find_shadow(target, name_or_path)
        if found is None:
            raise _missing(target, name_or_path)
        shadow = _checked(target, Artifact.open(found))
        if shadow.manifest.quantisation != SHADOW_FORMATS[name_or_path].label:
            raise ArtifactError(
                f"{found} is {shadow.manifest.quantisation}, not what {name_or_path} is: make it"
                f" again with `shoal shadow {target.path} --format {name_or_path} --force`"
            )
        return shadow
    if re.fullmatch(r"q\d\w*", name_or_path) and not Path(name_or_path).exists():
        shadow_format(name_or_path)  # raises: a format was meant, and it is not one of ours
    return _checked(target, Artifact.open(resolve_model(name_or_path)))


def find_or_make(target: Artifact, name_or_path: str, show: ShowProgress) -> Artifact:
    """Open the target's shadow as `open_shadow` does; make it first where it can be made.

    That takes a name (`q3`, `q4`) and a target with all its experts. Nothing is left of a shadow
    whose making was interrupted.

    Raises:
        As `open_shadow`; CannotWrite where there is no space; CorruptArtifact naming the damaged
        expert of the target.
    """
    can_make = name_or_path in SHADOW_FORMATS and has_all_experts(target.manifest)
    if can_make and find_shadow(target, name_or_path) is None:
        fmt, place = SHADOW_FORMATS[name_or_path], shadow_place(target, name_or_path)
        size = shadow_bytes(target, fmt)
        with show(f"{name_or_path} shadow of {target.name}", size) as progress:
            make_shadow(target, fmt, place, progress, force=False)
    return open_shadow(target, name_or_path)


def _places(target: Artifact, name: str) -> tuple[Path, Path]:
    at_home = f"{target.name}-{target.identity[:16]}-{name}{SUFFIX}"
    return (
        target.path / SHADOWS_DIR / f"{name}{SUFFIX}",
        shoal_home() / SHADOWS_DIR / at_home,
    )


def _missing(target: Artifact, name: str) -> UsageError:
    if has_all_experts(target.manifest):
        fix = f"make one with `shoal shadow {target.path} --format {name}`"
    else:
        fix = (
            "this slice has no experts to make one of: where the whole model is, run"
            f" `shoal slice MODEL OUT --preset coordinator --shadow {name}`, or `shoal shadow MODEL"
            f" OUT --format {name}` and bring OUT here"
        )
    return UsageError(f"{target.path} has no {name} shadow: {fix}")


def _checked(target: Artifact, shadow: Artifact) -> Artifact:
    whose = shadow.manifest.shadow_of
    if whose is None:
        raise ArtifactError(
            f"{shadow.path} is a model, not a shadow: make one with `shoal shadow {target.path}`"
        )
    if whose != target.identity:
        raise ArtifactError(
            f"{shadow.path} is the shadow of another model, {whose[:16]}...; {target.path} is"
            f" {target.identity[:16]}...: make its own with `shoal shadow {target.path}`"
        )
    if shadow.spec != target.spec:
        raise CorruptArtifact(f"{shadow.path} describes another model than the one it belongs to")
    if not has_all_experts(shadow.manifest):
        raise ArtifactError(f"{shadow.path} is a part of a shadow: all of its experts are needed")
    return shadow
