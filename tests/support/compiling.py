"""Objects of C++ sources, compiled side by side: a compiler uses one core."""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TIMEOUT_S = 240.0  # of one file, on a busy machine


def compile_objects(
    compiler: str, sources: Sequence[tuple[Path, Sequence[str]]], into: Path
) -> list[str]:
    """Compile each source with its flags; return the objects' paths, which lie in `into`.

    Raises CalledProcessError whose stderr says what the compiler said.
    """

    def compile_one(job: tuple[Path, Sequence[str]]) -> str:
        source, flags = job
        target = into / f"{source.stem}.o"
        command = [compiler, *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))
