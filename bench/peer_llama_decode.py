"""One decode by llama.cpp; run by the peer's own Python (bench/peer_llama.py).

python peer_llama_decode.py MODEL.gguf IDS [--threads 2] [--repack] [--lazy] [--trace FILE]
    [--show-routing]

Every token is given, so that each engine reads the same text. Prints one JSON object: seconds of
loading, and of every token; the best next tokens; bytes read from disk before the first token and
after each. The model is memory-mapped. --repack: weights rearranged for speed, in memory of the
process: not for models beyond RAM. --lazy: llama.cpp's own reading of marked tensors on demand.
--trace: experts of each token, replayed: the numbers that a router's top-k wrote are overwritten as
soon as they are computed (an eval callback; its cost is in the figures). --show-routing: print what
was chosen.
"""

import argparse
import ctypes
import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

lib: Any = importlib.import_module("llama_cpp")  # of the peer's venv: ours does not have it

GRAPH_NAME = b"ffn_moe_topk-"


class Routing:
    """Watches each layer's chosen experts, and replaces them where there is a trace.

    trace: tokens x layers x k expert ids: token 0 is the first of the prompt.
    """

    def __init__(self, trace: "list[list[list[int]]] | None") -> None:
        folder = Path(str(lib.__file__)).parent / "lib"
        ggml = ctypes.CDLL(str(folder / "libggml-base.so"))
        self._name, self._data, self._size = (
            ggml.ggml_get_name,
            ggml.ggml_get_data,
            ggml.ggml_nelements,
        )
        self._name.restype, self._data.restype = ctypes.c_char_p, ctypes.c_void_p
        self._size.restype = ctypes.c_int64
        for function in (self._name, self._data, self._size):
            function.argtypes = [ctypes.c_void_p]
        self._trace = trace
        self.token = 0
        self.seen: dict[int, list[list[int]]] = {}  # token: per layer, what the router chose
        self.callback = lib.ggml_backend_sched_eval_callback(self._on_node)

    def _on_node(self, tensor: int, is_question: bool, _user: int) -> bool:
        # The scheduler asks whether we want a node, then shows it computed.
        name = self._name(tensor)
        if not name.startswith(GRAPH_NAME):
            return not is_question
        if not is_question:
            layer, address = int(name[len(GRAPH_NAME) :]), self._data(tensor)
            experts = (ctypes.c_int32 * self._size(tensor)).from_address(address)
            self.seen.setdefault(self.token, []).append(list(experts))
            if self._trace is not None:
                experts[:] = self._trace[self.token][layer]
        return True


def main() -> None:
    """Load, decode, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repack", action="store_true")
    parser.add_argument("--lazy", action="store_true")
    parser.add_argument("--trace", type=Path, help="JSON: tokens x layers x k expert ids")
    parser.add_argument("--show-routing", action="store_true")
    chosen = parser.parse_args()
    began_s = time.perf_counter()
    lib.llama_log_set(SILENT, None)
    model, context, routing = load(chosen)
    load_s = time.perf_counter() - began_s
    best: list[int] = []
    seconds: list[float] = []
    num_read = [read_bytes()]
    for position, token in enumerate(map(int, chosen.ids.split(","))):
        if routing is not None:
            routing.token = position
        began_s = time.perf_counter()
        status = lib.llama_decode(context, batch_of(token))
        if status != 0:
            sys.exit(f"llama_decode: {status}")
        best.append(argmax(lib.llama_get_logits(context), model))
        seconds.append(time.perf_counter() - began_s)
        num_read.append(read_bytes())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report: dict[str, Any] = {
        "engine": f"llama-cpp-python {lib.__version__}",
        "load_s": load_s,
        "token_s": seconds,
        "read_bytes": num_read,
        "best": best,
        "major_faults": usage.ru_majflt,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
    if routing is not None and chosen.show_routing:
        report["routing"] = list(routing.seen.values())
    print(json.dumps(report))


def load(chosen: argparse.Namespace) -> "tuple[Any, Any, Routing | None]":
    """Open model and context as the options say."""
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    options.load_mode = lib.LLAMA_LOAD_MODE_MMAP
    options.lazy_mode = lib.LLAMA_LAZY_MODE_ON if chosen.lazy else lib.LLAMA_LAZY_MODE_OFF
    options.use_extra_bufts = chosen.repack
    model = lib.llama_model_load_from_file(chosen.model.encode(), options)
    if not model:
        sys.exit(f"llama.cpp cannot load {chosen.model}")
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = chosen.context
    settings.n_threads = settings.n_threads_batch = chosen.threads
    routing = None
    if chosen.trace is not None or chosen.show_routing:
        trace = chosen.trace and json.loads(chosen.trace.read_text())
        routing = Routing(trace)
        settings.cb_eval = routing.callback
    context = lib.llama_init_from_model(model, settings)
    return model, context, routing


def read_bytes() -> int:
    """Return the bytes that this process has had read from disk, page faults' included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def batch_of(token: int) -> Any:
    """Return a batch of one token: it points to NEXT."""
    NEXT[0] = token
    return lib.llama_batch_get_one(NEXT, 1)


def argmax(logits: Any, model: Any) -> int:
    """Return the best token; ties go to the lower id."""
    import numpy as np

    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return int(np.argmax(np.ctypeslib.as_array(logits, (vocab,))))


NEXT = (lib.llama_token * 1)()
SILENT = lib.llama_log_callback(lambda _level, _text, _user: None)

if __name__ == "__main__":
    main()
