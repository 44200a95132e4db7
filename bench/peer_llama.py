"""llama.cpp, to compare with: built from llama-cpp-python's source distribution, in its own venv.

python bench/peer_llama.py                       # build it (minutes), say where it is
python bench/peer_llama.py MODEL.gguf --ids 1,2,3 [--lazy] [--repack] [--trace FILE.json]

Nothing of it is imported here: each measurement is a process of the peer's own Python that runs
bench/peer_llama_decode.py. SHOAL_BENCH_LLAMA_PYTHON names another interpreter that has the same
version of llama-cpp-python, and spares the build.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "build" / "bench" / "peers"
VERSION = "0.3.36"
RUNNER = ROOT / "bench" / "peer_llama_decode.py"
PYTHON_VARIABLE = "SHOAL_BENCH_LLAMA_PYTHON"


class NoPeer(Exception):
    """The peer could not be built, or is of another version."""


def peer_python() -> Path:
    """Return an interpreter that has the peer; build it if there is none. Raises NoPeer."""
    if PYTHON_VARIABLE in os.environ:
        python = Path(os.environ[PYTHON_VARIABLE])
        if (version := _version(python)) != VERSION:
            raise NoPeer(f"{PYTHON_VARIABLE}={python}: has {version}, wanted {VERSION}")
        return python
    folder = PEERS / f"llama-cpp-python-{VERSION}"
    python = folder / "bin" / "python"
    if not python.exists() or _version(python) != VERSION:
        _build(folder)
    return python


def _build(folder: Path) -> None:
    print(f"building llama-cpp-python {VERSION} in {folder}: takes minutes", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    # For this machine alone, as its authors advise: the peer gets its best.
    flags = "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF"
    environment = {**os.environ, "CMAKE_ARGS": flags, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    source = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *source]
    done = subprocess.run(command, env=environment)
    if done.returncode != 0 or _version(folder / "bin" / "python") != VERSION:
        raise NoPeer(f"pip could not build llama-cpp-python {VERSION} in {folder}: see above")


def _version(python: Path) -> str:
    show = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    done = subprocess.run([python, "-c", show], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def decode_command(model: Path, ids: Sequence[int], *flags: str) -> list[str]:
    """Return the command that decodes these tokens and prints a JSON object: see the runner."""
    return [str(peer_python()), "-I", str(RUNNER), str(model), ",".join(map(str, ids)), *flags]


def main() -> None:
    """Build the peer; run it once if there is a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--ids", default="1,2,3,4,5,6,7,8", help="tokens to decode")
    chosen, flags = parser.parse_known_args()
    if chosen.model is None:
        print(peer_python())
        return
    ids = [int(word) for word in chosen.ids.split(",")]
    command = decode_command(chosen.model, ids, *flags)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
