"""`shoal verify`: read every byte of an artifact and compare every hash."""

import time
from typing import Annotated

import typer

from client.progress import byte_progress, say
from shoal.errors import CorruptArtifact
from shoal.paths import resolve_model

MAX_NAMED = 20


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an artifact: path or name")],
) -> None:
    """Check every hash of an artifact or slice.

    Exit status 3: something is damaged; each damaged file, tensor or expert is named.
    """
    from shoal.artifact import Artifact  # and NumPy with it: not for --help
    from shoal.artifact.verify import find_problems, total_bytes

    started = time.monotonic()
    artifact = Artifact.open_unchecked(resolve_model(model))
    size = total_bytes(artifact)
    with byte_progress(f"verify {artifact.name}", size) as progress:
        problems = list(find_problems(artifact, progress))
    if problems:
        named = problems[:MAX_NAMED]
        if len(problems) > MAX_NAMED:
            named.append(f"and {len(problems) - MAX_NAMED} more")
        raise CorruptArtifact(f"{len(problems)} damaged:\n  " + "\n  ".join(named))
    seconds = time.monotonic() - started
    say(f"{artifact.path}: {size:,} bytes are as they were written, in {seconds:.1f} s")
    say(f"identity {artifact.identity}")
