"""ggml as an engine of bench/peer/experts.py; run by the peer's own Python (bench/peer_llama.py).

python run_ggml_experts.py FORMAT FOLDER NUM_EXPERTS [--repack]

The graph of a call is what llama.cpp's own for a mixture of experts has between router and weighted
sum: mul_mat_id for gate and up, swiglu, mul_mat_id for down. A turn's calls are one graph, as a
model's layers are. No environment is set: ggml's threads wait as they were built to.
"""

import argparse
import ctypes
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the peer's Python runs isolated

from bench.peer.expert_turns import (
    DIM,
    EXPERTS_FILE,
    EXPERTS_PER_TOKEN,
    FFN_DIM,
    ROWS_FILE,
    Answer,
    Turn,
    serve,
)
from bench.steady import warm_up

TYPES = {"q4_0": 2, "q8_0": 8, "q4_k": 12}  # enum ggml_type of ggml.h, as are the next two
F32, I32 = 0, 26
GRAPH_NODES = 512
CONTEXT_BYTES = 1 << 20  # of tensor headers and graphs; their data lies in buffers
Pointer, Size, Count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class InitParams(ctypes.Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


BASE = {  # of libggml-base: what is returned, and the arguments
    "ggml_log_set": (None, [Pointer, Pointer]),
    "ggml_init": (Pointer, [InitParams]),
    "ggml_new_tensor_2d": (Pointer, [Pointer, ctypes.c_int, Count, Count]),
    "ggml_new_tensor_3d": (Pointer, [Pointer, ctypes.c_int, Count, Count, Count]),
    "ggml_nbytes": (Size, [Pointer]),
    "ggml_mul_mat_id": (Pointer, [Pointer] * 4),
    "ggml_swiglu_split": (Pointer, [Pointer] * 3),
    "ggml_set_input": (None, [Pointer]),
    "ggml_set_output": (None, [Pointer]),
    "ggml_new_graph_custom": (Pointer, [Pointer, Size, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_gallocr_new": (Pointer, [Pointer]),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, [Pointer, Pointer]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, [Pointer, Pointer]),
    "ggml_backend_get_default_buffer_type": (Pointer, [Pointer]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [Pointer]),
    "ggml_backend_reg_dev_get": (Pointer, [Pointer, Size]),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [Pointer, Pointer]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, Size, Size]),
    "ggml_backend_tensor_get": (None, [Pointer, Pointer, Size, Size]),
    "ggml_backend_graph_compute": (ctypes.c_int, [Pointer, Pointer]),
}
CPU = {  # of libggml-cpu
    "ggml_backend_cpu_init": (Pointer, []),
    "ggml_backend_cpu_reg": (Pointer, []),
    "ggml_backend_cpu_set_n_threads": (None, [Pointer, ctypes.c_int]),
}


def load() -> Any:
    """Return the functions that are used here, from the libraries of the peer's package."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        sys.exit("this Python has no llama_cpp")
    functions = argparse.Namespace()
    for name, table in (("ggml-base", BASE), ("ggml-cpu", CPU)):
        path = Path(found.origin).parent / "lib" / f"lib{name}.so"
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for function, (result, arguments) in table.items():
            entry = getattr(library, function)
            entry.restype, entry.argtypes = result, arguments
            setattr(functions, function.removeprefix("ggml_"), entry)
    return functions


ggml = load()
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)(lambda *_: None)
ggml.log_set(SILENT, None)


def new_context() -> Any:
    """Return where tensors and graphs are described; it is never freed."""
    return ggml.init(InitParams(CONTEXT_BYTES, None, True))


def put(tensor: Any, data: NDArray[Any]) -> None:
    """Copy an array into a tensor of the same bytes."""
    assert data.flags.c_contiguous and data.nbytes == ggml.nbytes(tensor), data.shape
    ggml.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)


def repacked_type(device: Any, registry: Any) -> Any:
    """Return the buffer type that rearranges weights when they are set."""
    address = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(device)
    i = 0
    while extra and extra[i]:
        if ggml.backend_buft_name(extra[i]) == b"CPU_REPACK":
            return extra[i]
        i += 1
    sys.exit("this ggml has no CPU_REPACK")


class Calls:
    """A graph of some calls, for as many rows."""

    def __init__(self, weights: list[Any], x: NDArray[np.float32], count: int, host: Any) -> None:
        context = new_context()
        self._graph = ggml.new_graph_custom(context, GRAPH_NODES, False)
        self._x = ggml.new_tensor_3d(context, F32, DIM, 1, len(x))
        ggml.set_input(self._x)
        self._ids = []
        for _ in range(count):
            ids = ggml.new_tensor_2d(context, I32, EXPERTS_PER_TOKEN, len(x))
            ggml.set_input(ids)
            gate, up = (ggml.mul_mat_id(context, m, self._x, ids) for m in weights[:2])
            hidden = ggml.swiglu_split(context, gate, up)
            self._out = ggml.mul_mat_id(context, weights[2], hidden, ids)
            ggml.build_forward_expand(self._graph, self._out)
            self._ids.append(ids)
        ggml.set_output(self._out)
        self._rows = x
        allocator = ggml.gallocr_new(host)
        if not ggml.gallocr_alloc_graph(allocator, self._graph):
            sys.exit("ggml cannot allocate a graph")

    def run(self, backend: Any, visits: list[list[int]]) -> float:
        """Compute; return the seconds."""
        put(self._x, self._rows)
        for ids, chosen in zip(self._ids, visits, strict=True):
            put(ids, np.tile(np.array(chosen, np.int32), (len(self._rows), 1)))
        began_s = time.perf_counter()
        status = ggml.backend_graph_compute(backend, self._graph)
        seconds = time.perf_counter() - began_s
        if status:
            sys.exit(f"ggml_backend_graph_compute: {status}")
        return seconds

    def result(self) -> list[float]:
        """Return the mean over experts of the last row of the last call."""
        out = np.empty((EXPERTS_PER_TOKEN, DIM), np.float32)
        offset = (len(self._rows) - 1) * out.nbytes
        ggml.backend_tensor_get(self._out, out.ctypes.data, offset, out.nbytes)
        mean: list[float] = out.mean(axis=0, dtype=np.float64).tolist()
        return mean


class Engine:
    """All experts of one format as three tensors in one buffer, as a GGUF file has a layer's."""

    def __init__(self, fmt: str, folder: Path, num_experts: int, repack: bool) -> None:
        self._backend = ggml.backend_cpu_init()
        registry = ggml.backend_cpu_reg()
        device = ggml.backend_reg_dev_get(registry, 0)
        self._host = ggml.backend_get_default_buffer_type(self._backend)
        context = new_context()
        shapes = ((DIM, FFN_DIM), (DIM, FFN_DIM), (FFN_DIM, DIM))
        self._weights = [
            ggml.new_tensor_3d(context, TYPES[fmt], cols, rows, num_experts)
            for cols, rows in shapes
        ]
        kind = repacked_type(device, registry) if repack else self._host
        if not ggml.backend_alloc_ctx_tensors_from_buft(context, kind):
            sys.exit("ggml cannot allocate the experts")
        self.is_supported = all(self._can_multiply(device, i) for i in range(len(shapes)))
        self._x = np.load(folder / ROWS_FILE)
        self._calls: dict[tuple[int, int], Calls] = {}
        if self.is_supported:
            self._fill(np.load(folder / EXPERTS_FILE), num_experts)

    def _can_multiply(self, device: Any, index: int) -> bool:
        context = new_context()
        cols = FFN_DIM if index == 2 else DIM
        x = ggml.new_tensor_3d(context, F32, cols, EXPERTS_PER_TOKEN if index == 2 else 1, 1)
        ids = ggml.new_tensor_2d(context, I32, EXPERTS_PER_TOKEN, 1)
        product = ggml.mul_mat_id(context, self._weights[index], x, ids)
        return bool(ggml.backend_dev_supports_op(device, product))

    def _fill(self, distinct: NDArray[np.uint8], num_experts: int) -> None:
        numbers = np.arange(num_experts) % len(distinct)
        matrices = np.split(distinct, len(self._weights), axis=1)
        for tensor, matrix in zip(self._weights, matrices, strict=True):
            put(tensor, matrix[numbers])

    def run(self, turn: Turn) -> Answer:
        """Do one turn."""
        ggml.backend_cpu_set_n_threads(self._backend, turn.threads)
        warm, timed = turn.visits[: turn.num_warm], turn.visits[turn.num_warm :]
        if warm:
            warm_up(lambda: self._graph(turn.rows, len(warm)).run(self._backend, warm))
        calls = self._graph(turn.rows, len(timed))
        seconds = calls.run(self._backend, timed)
        return Answer(seconds, calls.result() if turn.wants_result else None)

    def _graph(self, num_rows: int, count: int) -> Calls:
        key = (num_rows, count)
        if key not in self._calls:
            self._calls[key] = Calls(self._weights, self._x[:num_rows], count, self._host)
        return self._calls[key]


def main() -> None:
    """Load, then serve turns until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=TYPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_experts", type=int)
    parser.add_argument("--repack", action="store_true")
    chosen = parser.parse_args()
    engine = Engine(chosen.format, chosen.folder, chosen.num_experts, chosen.repack)
    serve(engine.run if engine.is_supported else None)


if __name__ == "__main__":
    main()
