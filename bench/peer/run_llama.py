"""llama.cpp as an engine of bench/peer; run by the peer's own Python (bench/peer_llama.py).

python run_llama.py MODEL.gguf --max-context N [--repack]

A long context is the saved state of a short one, loaded again and again: its cells are as many, and
attention reads them all.
"""

import argparse
import ctypes
import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the peer's Python runs isolated

from bench.peer.phases import FILL_ROWS, Phase, serve
from bench.steady import warm_up

lib: Any = importlib.import_module("llama_cpp")  # of the peer's venv: ours does not have it

SILENT = lib.llama_log_callback(lambda _level, _text, _user: None)
SEQUENCE, OTHER = 0, 1


class Engine:
    """One sequence in llama.cpp's KV cache."""

    def __init__(self, path: str, max_context: int, repack: bool) -> None:
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.n_gpu_layers = 0
        options.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        options.use_extra_bufts = repack
        model = lib.llama_model_load_from_file(path.encode(), options)
        if not model:
            sys.exit(f"llama.cpp cannot load {path}")
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = max_context, FILL_ROWS, FILL_ROWS
        settings.n_seq_max, settings.kv_unified = 2, True
        self._context = lib.llama_init_from_model(model, settings)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")
        self._memory = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(FILL_ROWS, 0, 1)
        self._decode(FILL_ROWS, 0, 1)
        size = lib.llama_state_seq_get_size(self._context, SEQUENCE)
        self._saved = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self._context, self._saved, size, SEQUENCE) != size:
            sys.exit("llama.cpp cannot save a sequence")

    def run(self, phase: Phase, mark: Callable[[], float]) -> None:
        """Do one phase; its rows are removed after each pass."""
        lib.llama_set_n_threads(self._context, phase.threads, phase.threads)
        position = self._fill(phase.context)

        def step() -> None:
            self._decode(phase.rows, position, phase.num_logits)
            self._forget(position)

        warm_up(step)
        mark()
        for _ in range(phase.steps):
            step()
            mark()

    def _fill(self, context: int) -> int:
        """Fill as many cells; return the position that follows."""
        lib.llama_memory_clear(self._memory, False)
        if not context:
            return 0
        if context % FILL_ROWS:
            sys.exit(f"a context of {context}: must be a multiple of {FILL_ROWS}")
        for _ in range(context // FILL_ROWS):
            size = len(self._saved)
            if lib.llama_state_seq_set_data(self._context, self._saved, size, OTHER) != size:
                sys.exit("llama.cpp cannot load a sequence")
            lib.llama_memory_seq_cp(self._memory, OTHER, SEQUENCE, -1, -1)
            lib.llama_memory_seq_rm(self._memory, OTHER, -1, -1)
        return int(FILL_ROWS)

    def _forget(self, position: int) -> None:
        if not lib.llama_memory_seq_rm(self._memory, SEQUENCE, position, -1):
            sys.exit("llama.cpp cannot remove rows")

    def _decode(self, num_rows: int, position: int, num_logits: int) -> None:
        ids = random.Random(position)
        self._batch.n_tokens = num_rows
        for row in range(num_rows):
            self._batch.token[row] = ids.randrange(self._vocab)
            self._batch.pos[row] = position + row
            self._batch.n_seq_id[row] = 1
            self._batch.seq_id[row][0] = SEQUENCE
            self._batch.logits[row] = row >= num_rows - num_logits
        if status := lib.llama_decode(self._context, self._batch):
            sys.exit(f"llama_decode: {status}")
        lib.llama_synchronize(self._context)


def main() -> None:
    """Load, then serve phases until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--max-context", type=int, required=True)
    parser.add_argument("--repack", action="store_true")
    chosen = parser.parse_args()
    lib.llama_log_set(SILENT, None)
    serve(Engine(chosen.model, chosen.max_context, chosen.repack).run)


if __name__ == "__main__":
    main()
