"""Worker: computes admitted calls, one at a time, and answers each with one terminal frame.

A small call whose experts are in memory is computed right where it arrived, on the event loop: a
hand-over to another thread costs 90-200 us (measured), more than its compute. Larger calls run on
one compute thread, so that the loop goes on reading frames, sending progress and answering health
checks. Knows nothing of how frames travel.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from expert_node.admission import Admission, Refusal, Ticket
from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.experts.executor import Computed
from shoal.log import get_logger
from shoal.v1 import expert_pb2 as pb

_log = get_logger("worker")


class Executor(Protocol):
    """What a worker computes with: an `ExpertExecutor`."""

    def check(self, call: ExpertCall) -> None: ...
    def pair_bytes(self, call: ExpertCall) -> int: ...
    def is_resident(self, call: ExpertCall) -> bool: ...
    def grid(self, layer: int) -> int: ...
    def compute_timed(self, call: ExpertCall) -> Computed: ...


class Caller(Protocol):
    """Who gets a call's frames: a session."""

    def finished(self, call_id: int, frame: bytes) -> None:
        """Take the call's terminal frame. Called once a call, on the event loop."""
        ...

    def progressed(self, call_ids: list[int]) -> None:
        """Learn which of its calls have been held for a progress interval or longer."""
        ...


@dataclass(slots=True)
class Job:
    """A decoded and checked call, and who waits for it."""

    ticket: Ticket
    call: ExpertCall
    caller: Caller
    is_cancelled: bool = False
    is_answered: bool = False


class Worker:
    """Runs jobs. All methods are called on the event loop's thread."""

    def __init__(
        self,
        executor: Executor,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_waiting: int = limits.MAX_QUEUED_CALLS,
        inline_pair_bytes: int = limits.INLINE_PAIR_BYTES,
        log_calls: bool = False,
    ) -> None:
        self._executor = executor
        self._loop = loop
        self._clock = clock
        self._admission = Admission(max_waiting)
        self._inline_pair_bytes = inline_pair_bytes
        self._log_calls = log_calls
        self._jobs: dict[tuple[int, int], Job] = {}
        self._thread = ThreadPoolExecutor(1, "shoal-compute")
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_ticking = False
        self._is_pump_due = False

    @property
    def num_held(self) -> int:
        """Calls waiting or running."""
        return self._admission.num_held

    @property
    def is_draining(self) -> bool:
        return self._admission.is_draining

    def check(self, call: ExpertCall) -> None:
        """Refuse a call that does not fit the model or the ownership (see `ExpertExecutor`)."""
        self._executor.check(call)

    def submit(self, job: Job) -> None:
        """Take a checked job; its caller gets its terminal frame now or later."""
        refusal = self._admission.admit(job.ticket)
        if refusal is not None:
            self._fail(job, _refused(refusal, self._admission.num_waiting))
            return
        self._jobs[job.ticket.key] = job
        self._pump()
        if self._jobs:
            self._idle.clear()
            self._tick_later()

    def cancel(self, key: tuple[int, int]) -> None:
        """End a call early if it is held; its terminal frame says CANCELLED."""
        ticket = self._admission.cancel(key)
        if ticket is not None:
            self._drop(ticket, errors.CallCancelled("cancelled while it waited"))
        elif key in self._jobs:
            self._jobs[key].is_cancelled = True

    def drop_stream(self, stream_id: int) -> None:
        """Forget the calls of a stream that is gone; a running one ends unheard."""
        for ticket in self._admission.drop_stream(stream_id):
            del self._jobs[ticket.key]
        for job in self._jobs.values():
            if job.ticket.stream_id == stream_id:
                job.is_cancelled = True
        self._note_idle()

    def drain(self) -> None:
        """Refuse new calls; what is held goes on."""
        self._admission.drain()

    async def wait_idle(self) -> None:
        """Return once no call is held."""
        await self._idle.wait()

    def abandon(self, error: errors.ShoalError) -> None:
        """Answer every held call with that error: the drain ran out of time."""
        for ticket in self._admission.expire(float("inf")):
            self._drop(ticket, error)
        for job in self._jobs.values():
            job.is_answered = True
            self._fail(job, error)

    def close(self) -> None:
        """Let the compute thread go. Waits for the call that it runs."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _pump(self) -> None:
        # Starts the next call. At most one is computed inline per turn of the loop: a queue of
        # small calls must not keep the loop from its streams.
        self._is_pump_due = False
        chosen = self._admission.start_next(self._clock())
        for ticket in chosen.expired:
            self._drop(ticket, errors.CallTimeout("its deadline passed before it could start"))
        if chosen.start is None:
            return
        job = self._jobs[chosen.start.key]
        if self._is_small(job.call):
            self._end(job, self._terminal_frame(job))
        else:
            self._thread.submit(self._terminal_frame, job).add_done_callback(
                lambda future: self._loop.call_soon_threadsafe(self._end, job, future.result())
            )

    def _is_small(self, call: ExpertCall) -> bool:
        is_short = self._executor.pair_bytes(call) <= self._inline_pair_bytes
        return is_short and self._executor.is_resident(call)

    def _end(self, job: Job, frame: bytes) -> None:
        self._admission.finish(job.ticket.key)
        del self._jobs[job.ticket.key]
        if job.is_answered:
            pass
        elif job.is_cancelled:
            self._fail(job, errors.CallCancelled("cancelled while it was computed"))
        else:
            job.caller.finished(job.ticket.call_id, frame)
        if self._log_calls:  # even a line that is filtered out costs a small call 5 us
            self._log_call(job, len(frame))
        self._note_idle()
        if self._admission.num_waiting and not self._is_pump_due:
            self._is_pump_due = True
            self._loop.call_soon(self._pump)

    def _log_call(self, job: Job, num_bytes: int) -> None:
        _log.debug(
            "call answered",
            stream=job.ticket.stream_id,
            call_id=job.ticket.call_id,
            layer=job.call.layer,
            rows=job.call.rows.num_rows,
            pairs=int(job.call.experts.size),
            held_us=_microseconds(self._clock() - job.ticket.received_s),
            frame_bytes=num_bytes,
        )

    def _terminal_frame(self, job: Job) -> bytes:
        # The top of a call, on either thread: whatever goes wrong becomes its terminal frame.
        call_id = job.ticket.call_id
        began_s = self._clock()
        try:
            computed = self._executor.compute_timed(job.call)
            ended_s = self._clock()
            return wire.encode_reply(
                call_id,
                computed.sums,
                self._executor.grid(job.call.layer),
                queue_us=_microseconds(began_s - job.ticket.received_s),
                compute_us=_microseconds(ended_s - began_s),
                load_us=_microseconds(computed.load_s),
            ).SerializeToString()
        except (errors.ShoalError, OSError, MemoryError) as error:
            _log.warning("call failed", call_id=call_id, layer=job.call.layer, error=str(error))
            return failure_frame(call_id, error)
        except Exception:  # noqa: BLE001  the top of a call: what gets here is our bug
            error_id = secrets.token_hex(4)
            _log.exception("bug", call_id=call_id, layer=job.call.layer, error_id=error_id)
            return failure_frame(
                call_id, errors.NodeError(f"internal error {error_id}: see the node's log")
            )

    def _drop(self, ticket: Ticket, error: errors.ShoalError) -> None:
        self._fail(self._jobs.pop(ticket.key), error)
        self._note_idle()

    def _fail(self, job: Job, error: errors.ShoalError) -> None:
        _log.info("call refused", call_id=job.ticket.call_id, error=str(error))
        job.caller.finished(job.ticket.call_id, failure_frame(job.ticket.call_id, error))

    def _note_idle(self) -> None:
        if not self._jobs:
            self._idle.set()

    def _tick_later(self) -> None:
        if not self._is_ticking:
            self._is_ticking = True
            self._loop.call_later(limits.PROGRESS_INTERVAL_S, self._tick)

    def _tick(self) -> None:
        self._is_ticking = False
        now_s = self._clock()
        for ticket in self._admission.expire(now_s):
            self._drop(ticket, errors.CallTimeout("its deadline passed while it waited"))
        held: dict[int, tuple[Caller, list[int]]] = {}
        for ticket in self._admission.held_since(now_s - limits.PROGRESS_INTERVAL_S / 2):
            job = self._jobs[ticket.key]
            _, call_ids = held.setdefault(ticket.stream_id, (job.caller, []))
            call_ids.append(ticket.call_id)
        for caller, call_ids in held.values():
            caller.progressed(call_ids)
        if self._jobs:
            self._tick_later()


def failure_frame(call_id: int, error: BaseException) -> bytes:
    """Return the serialised terminal frame of a call that failed."""
    return pb.NodeFrame(failure=wire.failure_of(call_id, error)).SerializeToString()


def _refused(refusal: Refusal, num_waiting: int) -> errors.ShoalError:
    if refusal is Refusal.DRAINING:
        return errors.NodeDraining("it finishes what it has and takes nothing new")
    return errors.NodeBusy(f"{num_waiting} calls wait here already: try later or elsewhere")


def _microseconds(seconds: float) -> int:
    return min(max(0, int(seconds * 1e6)), 2**32 - 1)
