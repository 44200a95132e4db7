"""Where models and sources live: `$SHOAL_HOME`, the platform's cache folder, this package."""

import os
from pathlib import Path

import platformdirs

from shoal.errors import UsageError

SUFFIX = ".shoal"  # of an artifact's folder
SHADOWS_DIR = "shadows"  # in a model's folder, or at home
BUNDLED = "fables"  # the model that comes with this package, and runs where none is named


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


def user_folder(typed: str | Path) -> Path:
    """Return a --data-dir as somebody typed it. Raises UsageError: there is no such folder."""
    folder = user_path(typed)
    if not folder.is_dir():
        raise UsageError(f"--data-dir {typed}: no such folder: it holds a copy of the artifact")
    return folder


def models_dir() -> Path:
    """Return the folder of artifacts that are found by name."""
    return shoal_home() / "models"


def sources_dir() -> Path:
    """Return the folder of what `shoal pull` brings."""
    return shoal_home() / "sources"


def history_dir() -> Path:
    """Return the folder of the user's own texts, kept only where `--history` asks for it."""
    home = os.environ.get("SHOAL_HOME", "")
    # State, not cache: emptying a cache must not cost what the user asked to keep.
    return (user_path(home) if home else platformdirs.user_state_path("shoal")) / "history"


def default_model() -> Path:
    """Return the folder of the model that comes with this package."""
    return _bundled_dir() / (BUNDLED + SUFFIX)


def is_artifact(name_or_path: str) -> bool:
    """Return whether somebody who types this means a model: an artifact of that name is there."""
    try:
        return (resolve_model(name_or_path) / "manifest.json").is_file()
    except (UsageError, OSError, ValueError):  # a prompt: too long for a name, or with a zero byte
        return False


def _bundled_dir() -> Path:
    return Path(__file__).parent / "models"


def resolve_model(name_or_path: str | Path) -> Path:
    """Return the artifact's folder: a path as it is, else a name.

    A name is looked for under `models_dir()`, then among what comes with this package. The suffix
    `.shoal` may be left out. A path in the current folder wins over a name.

    Raises:
        UsageError: nothing is there; the message lists the names that are.
    """
    if not str(name_or_path):
        raise UsageError("the model's name is empty: give the name or the path of an artifact")
    typed = user_path(name_or_path)
    tries = [typed, typed.with_name(typed.name + SUFFIX)] if typed.name else [typed]
    if len(typed.parts) == 1:
        for folder in (models_dir(), _bundled_dir()):
            tries += [folder / typed.name, folder / (typed.name + SUFFIX)]
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
    raise UsageError(f"no model {str(name_or_path)!r}: {listing}; with shoal comes: {BUNDLED}")
