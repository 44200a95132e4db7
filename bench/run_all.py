"""`make bench`: every benchmark that this machine's memory and disk allow, one after the other."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from bench.memory_cap import MemoryCap, NoMemoryCap
from shoal.limits import MIB

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "bench" / "models"
STREAMING = ("--tokens", "208", "--peer-tokens", "16", "--repeats", "1")  # some 15 minutes
MODEL_BYTES = 6 * 1024**3  # twelve layers with four-bit experts: the artifact; its GGUF is as large


def bench(script: str, *arguments: str) -> None:
    """Run one script. Raises CalledProcessError."""
    print(f"\n$ python bench/{script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / "bench" / script), *arguments], check=True)


def no_memory_cap() -> str | None:
    """Return why this process cannot bound another's memory; None: it can."""
    try:
        with MemoryCap(f"shoal-bench-{os.getpid()}", 64 * MIB):
            return None
    except NoMemoryCap as error:
        return str(error)


def main() -> None:
    """Run them all; leave out what does not fit, and say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", nargs="+", default=["q4_0", "q4_k"], help="of the model")
    chosen = parser.parse_args()
    bench("bench_kernels.py")
    bench("bench_dispatch.py")
    bench("bench_cache.py")
    bench("bench_prefetch.py")
    bench("bench_start.py")
    MODELS.mkdir(parents=True, exist_ok=True)
    for experts in chosen.experts:
        model = MODELS / f"qwen3-30b-a3b-12-layers-{experts}-seed-0.shoal"
        memory = psutil.virtual_memory().available
        if memory < 2 * MODEL_BYTES:  # in process, beside the two nodes' halves
            print(f"left out: the whole model needs {2 * MODEL_BYTES / 1e9:.0f} GB of free memory")
            return
        if not model.exists() and shutil.disk_usage(MODELS).free < 3 * MODEL_BYTES:
            print(f"left out: the model needs {3 * MODEL_BYTES / 1e9:.0f} GB of free disk")
            return
        bench("make_synthetic.py", str(MODELS), "--experts", experts)
        bench("bench_model.py", str(model))
        bench("bench_memory.py", str(model))
        if (why := no_memory_cap()) is None:
            bench("bench_streaming.py", str(model), *STREAMING)
        else:
            print(f"left out: decoding under a memory cap needs a memory cgroup: {why}")
    bench("bench_reads.py")


if __name__ == "__main__":
    main()
