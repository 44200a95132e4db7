"""Where models and their sources live: `$SHOAL_HOME`, or the platform's cache folder."""

import os
from pathlib import Path

import platformdirs

from shoal.errors import UsageError

SUFFIX = ".shoal"  # of an artifact's folder


def shoal_home() -> Path:
    """Return `$SHOAL_HOME`, or the user's cache folder for shoal. It need not exist yet."""
    configured = os.environ.get("SHOAL_HOME", "")
    return user_path(configured) if configured else platformdirs.user_cache_path("shoal")


def user_path(typed: str | Path) -> Path:
    """Return a path as somebody typed it, `~` and `~name` expanded. Raises UsageError."""
    try:
        return Path(typed).expanduser()
    except RuntimeError:
        raise UsageError(f"{typed}: no such user's folder: write the path in full") from None


def models_dir() -> Path:
    """Return the folder of artifacts that are found by name."""
    return shoal_home() / "models"


def sources_dir() -> Path:
    """Return the folder of what `shoal pull` brings."""
    return shoal_home() / "sources"


def resolve_model(name_or_path: str | Path) -> Path:
    """Return the artifact's folder: a path as it is, else a name under `models_dir()`.

    The suffix `.shoal` may be left out. A path in the current folder wins over a name.

    Raises:
        UsageError: nothing is there; the message lists the names that are.
    """
    if not str(name_or_path):
        raise UsageError("the model's name is empty: give the name or the path of an artifact")
    typed = user_path(name_or_path)
    tries = [typed, typed.with_name(typed.name + SUFFIX)] if typed.name else [typed]
    if len(typed.parts) == 1:
        tries += [models_dir() / typed.name, models_dir() / (typed.name + SUFFIX)]
    for candidate in tries:
        if candidate.is_dir():
            return candidate
        if candidate.is_file():
            raise UsageError(
                f"{candidate} is a file, not an artifact: make one with"
                f" `shoal convert {candidate} NAME{SUFFIX}`"
            )
    known = sorted(p.name.removesuffix(SUFFIX) for p in models_dir().glob(f"*{SUFFIX}"))
    listing = (
        f"models in {models_dir()}: {', '.join(known)}"
        if known
        else (f"{models_dir()} holds no model yet: `shoal pull` and `shoal convert` make one")
    )
    raise UsageError(f"no model {str(name_or_path)!r}: {listing}")
