"""The model that comes with shoal, for tests that need real routing: small, quick, always there."""

from pathlib import Path

from shoal.paths import default_model

PROMPT = "Once upon a time"
NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 32, 4


def fables() -> Path:
    """Return its folder. Read only: it is the package's own."""
    return default_model()
