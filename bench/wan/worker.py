"""A coordinator in a process of its own: its weights are read once, then it is asked line by line.

    with Worker(setup) as worker:
        result = worker.ask(request)

`python -m bench.wan.worker` is that process. First line from stdin: the setup; each further one: a
request, answered by a line. What a drafter has learned of passes and chances stays from request to
request, as in any coordinator that serves; what was generated does not, without --history.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.line_process import LineProcess
from bench.wan.figures import Result
from coordinator.app import Coordinator, CoordinatorConfig, Feedback, OpenedModel, start_engine
from coordinator.cancellation import Cancellation
from coordinator.report import Transcript
from coordinator.request import GenerationRequest, TokenGenerated
from coordinator.speculation.config import Speculate, SpeculationConfig
from shoal.ops import SamplingParams

MAX_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a coordinator is started with. moe_shards: None: every expert in its process.

    speculation: of coordinator.speculation.SpeculationConfig. home: SHOAL_HOME, where a history
    lies; None: as it is.
    """

    model: str
    moe_shards: str | None = None
    speculation: dict[str, Any] = field(default_factory=lambda: {"mode": "off"})
    home: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What is generated; the seed is of the sampling."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int = 0


class Worker(LineProcess):
    """The process; one request at a time."""

    def __init__(self, setup: WorkerSetup) -> None:
        environment = None if setup.home is None else {**os.environ, "SHOAL_HOME": setup.home}
        command = [sys.executable, "-P", "-m", "bench.wan.worker"]
        super().__init__("a coordinator", command, environment)
        self.ready: Result = self.exchange(asdict(setup))

    def ask(self, request: Request) -> Result:
        """Return what came of it. Raises RuntimeError if it failed."""
        result: Result = self.exchange(asdict(request))
        if result["error"] is not None:
            raise RuntimeError(f"the request failed: {result['error']}")
        return result


def main() -> None:
    """Serve requests until stdin ends."""
    setup = WorkerSetup(**json.loads(sys.stdin.readline()))
    given = dict(setup.speculation)
    speculation = SpeculationConfig(mode=Speculate(given.pop("mode")), **given)
    config = CoordinatorConfig(
        setup.model,
        moe_shards=setup.moe_shards,
        max_context=MAX_CONTEXT,
        warmup=True,
        speculation=speculation,
    )
    feedback = Feedback(
        tell=lambda text: print(text, file=sys.stderr),
        show_load=lambda _: None,
        show_making=lambda *_: nullcontext(lambda _: None),
    )
    began_s = time.perf_counter()
    with start_engine(OpenedModel(config), feedback) as coordinator:
        print(json.dumps({"start_s": time.perf_counter() - began_s}), flush=True)
        for line in sys.stdin:
            print(json.dumps(serve(coordinator, Request(**json.loads(line)))), flush=True)


def serve(coordinator: Coordinator, request: Request) -> Result:
    """Serve one; return its tokens and figures."""
    sampling = SamplingParams(temperature=request.temperature, seed=request.seed)
    transcript = Transcript(
        GenerationRequest(tuple(request.prompt_ids), request.max_tokens, sampling)
    )
    token_s: list[float] = []
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for event in coordinator.generate(transcript, Cancellation()):
        if isinstance(event, TokenGenerated):
            token_s.append(round(time.perf_counter() - began_s, 4))
    cpu_s = time.process_time() - began_cpu_s
    finished, prefill, decode = transcript.finished, transcript.prefill, transcript.decode
    assert finished is not None and prefill is not None and decode is not None
    timings, speculation = finished.timings, finished.speculation
    assert speculation is not None
    return {
        "token_ids": [token.token_id for token in transcript.tokens],
        "reason": str(finished.reason),
        "error": None if finished.error is None else str(finished.error),
        "first_token_s": timings.first_token_s,
        "decode_s": timings.decode_s,
        "num_reused": timings.num_reused_tokens,
        "cpu_s": cpu_s,
        "token_s": token_s,
        "prefill_round_trips": prefill.num_fanouts,
        "decode_round_trips": speculation.round_trips,
        "decode_fanouts": decode.num_fanouts,
        "fanout_p50_s": decode.latency_p50_s,
        "fanout_p99_s": decode.latency_p99_s,
        "beyond_compute_p50_s": decode.beyond_compute_p50_s,
        "bytes_up": prefill.bytes_up + decode.bytes_up,
        "bytes_down": prefill.bytes_down + decode.bytes_down,
        "passes": speculation.passes,
        "drafted": speculation.drafted,
        "accepted": speculation.accepted,
        "local_expert_bytes": speculation.local_expert_bytes,
        "per_drafter": {name: asdict(of) for name, of in speculation.per_drafter.items()},
    }


if __name__ == "__main__":
    main()
