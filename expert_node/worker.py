"""Worker: computes admitted calls and answers each with one terminal frame.

A small call whose experts are in memory is computed right where it arrived, on the event loop: a
hand-over to another thread costs 90-200 us (measured), more than its compute. Larger calls run on
one compute thread, so that the loop goes on reading frames, sending progress and answering health
checks. A call whose experts must be read first gets a loading thread: it computes what comes as it
comes, and nobody waits behind it. Knows nothing of how frames travel.

While nothing is held, a small call of a layer that is in memory whole takes the short way
(`answer_now`): no ticket, no job, nothing that could be asked for before it is over. What admission
would have said of it is said by what has to be empty for that.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from expert_node.admission import Admission, Refusal, Ticket
from shoal import errors, limits, wire
from shoal.experts.call import ExpertCall
from shoal.experts.executor import Computed
from shoal.log import get_logger
from shoal.ops.frames import CallView
from shoal.transport import Wire
from shoal.v1 import expert_pb2 as pb

_log = get_logger("worker")


class Opened(Protocol):
    """A call that holds its experts or waits for them: an `OpenCall`."""

    def compute(self) -> Computed: ...
    def abandon(self, error: BaseException) -> None: ...


class Executor(Protocol):
    """What a worker computes with: an `ExpertExecutor`."""

    def check(self, call: ExpertCall) -> None: ...
    def pair_bytes(self, call: ExpertCall) -> int: ...
    def is_resident(self, call: ExpertCall) -> bool: ...
    def grid(self, layer: int) -> int: ...
    def answer_resident(
        self, call: CallView, max_weight_bytes: int, queue_us: int
    ) -> bytes | None: ...
    def open(self, call: ExpertCall, stream: int) -> Opened: ...
    def try_open(self, call: ExpertCall, stream: int) -> Opened | None: ...
    @property
    def wants_hints(self) -> bool: ...
    def hint(self, layer: int, experts: Sequence[int], stream: int) -> None: ...


class Caller(Protocol):
    """Who gets a call's frames: a session."""

    def finished(self, call_id: int, frame: bytes) -> None:
        """Take the call's terminal frame. Called once a call, on the event loop."""
        ...

    def progressed(self, call_ids: list[int]) -> None:
        """Learn which of its calls have been held for a progress interval or longer."""
        ...


class Gate(Protocol):
    """What lets calls be computed beside the worker while it has nothing: `LentSockets`."""

    def shut(self) -> None: ...
    def open(self) -> None: ...


@dataclass(slots=True)
class Job:
    """A decoded and checked call, and who waits for it; opened: once it is computed or loads.

    wire: how its reply travels.
    """

    ticket: Ticket
    call: ExpertCall
    caller: Caller
    wire: Wire = Wire.EXACT
    opened: Opened | None = None
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
        max_loading: int = limits.MAX_LOADING_CALLS,
        inline_pair_bytes: int = limits.INLINE_PAIR_BYTES,
        log_calls: bool = False,
        gate: Gate | None = None,
    ) -> None:
        self._executor = executor
        self._loop = loop
        self._clock = clock
        self._admission = Admission(max_waiting, max_loading)
        self._inline_pair_bytes = inline_pair_bytes
        self._log_calls = log_calls
        self._jobs: dict[tuple[int, int], Job] = {}
        self._thread = ThreadPoolExecutor(1, "shoal-compute")
        self._loaders = ThreadPoolExecutor(max_loading, "shoal-load")
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_ticking = False
        self._is_pump_due = False
        self._is_answering = False
        self._gate = gate
        self._set_gate()

    @property
    def num_held(self) -> int:
        """Calls waiting, loading or running. From any thread."""
        return self._admission.num_held + self._is_answering

    @property
    def num_loading(self) -> int:
        """Calls that wait for reads."""
        return self._admission.num_loading

    @property
    def is_draining(self) -> bool:
        return self._admission.is_draining

    def configure(self, *, max_waiting: int, log_calls: bool) -> None:
        """Take other settings (see `__init__`) from now on."""
        self._admission.set_max_waiting(max_waiting)
        self._log_calls = log_calls
        self._set_gate()

    def check(self, call: ExpertCall) -> None:
        """Refuse a call that does not fit the model or the ownership (see `ExpertExecutor`)."""
        self._executor.check(call)

    @property
    def wants_hints(self) -> bool:
        """Whether it can do anything with `hint`."""
        return self._executor.wants_hints

    def hint(self, layer: int, experts: Sequence[int], stream: int) -> None:
        """Hear which experts a stream's next call of a layer will likely need."""
        self._executor.hint(layer, experts, stream)

    def answer_now(self, call: CallView, received_s: float) -> bytes | None:
        """Return a call's terminal frame if it may be computed before this returns.

        None: nothing was done; `check` and `submit` it.
        """
        if self._jobs or self._is_pump_due or self._log_calls or self._admission.is_draining:
            return None
        began_s = self._clock()
        waited_s = began_s - received_s
        if waited_s >= call.deadline_ms * 1e-3:
            return None
        self._is_answering = True
        try:
            frame = self._executor.answer_resident(
                call, self._inline_pair_bytes, _microseconds(waited_s)
            )
        except Exception as error:  # noqa: BLE001  the top of a call
            frame = self._failure(call.call_id, call.layer, error)
        finally:
            self._is_answering = False
        if self._clock() - began_s > limits.INLINE_TURN_S:
            self._pump_later()  # to nothing: what comes in this turn of the loop waits for the next
        return frame

    def submit(self, job: Job) -> None:
        """Take a checked job; its caller gets its terminal frame now or later."""
        # Only a call that cannot start at once is asked: its reads need not wait for its turn.
        must_load = self._admission.running is not None and not self._executor.is_resident(job.call)
        refusal = self._admission.admit(job.ticket, must_load=must_load)
        if refusal is not None:
            self._fail(job, _refused(refusal, self._admission.num_waiting))
            return
        self._jobs[job.ticket.key] = job
        self._set_gate()
        if not self._is_pump_due:  # else enough was computed in this turn
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
            self._give_up(self._jobs[key])

    def drop_stream(self, stream_id: int) -> None:
        """Forget the calls of a stream that is gone; a running one ends unheard."""
        for ticket in self._admission.drop_stream(stream_id):
            del self._jobs[ticket.key]
        for job in self._jobs.values():
            if job.ticket.stream_id == stream_id:
                self._give_up(job)
        self._note_idle()

    def drain(self) -> None:
        """Refuse new calls; what is held goes on."""
        self._admission.drain()
        self._set_gate()

    async def wait_idle(self) -> None:
        """Return once no call is held."""
        await self._idle.wait()

    def abandon(self, error: errors.ShoalError) -> None:
        """Answer every held call with that error: the drain ran out of time."""
        for ticket in self._admission.expire(float("inf")):
            self._drop(ticket, error)
        for job in self._jobs.values():
            self._give_up(job)
            job.is_answered = True
            self._fail(job, error)

    def close(self) -> None:
        """Let the threads go. Waits for the calls that they compute; no call waits for reads."""
        for job in self._jobs.values():
            self._give_up(job)
        self._thread.shutdown(wait=True)
        self._loaders.shutdown(wait=True)

    def _pump(self) -> None:
        # Starts what can start. A queue of small calls must not keep the loop from its streams: one
        # is computed inline per turn of the loop; of those that come in one piece, as many as are
        # short.
        self._is_pump_due = False
        if not self._jobs:  # it was for the loop to turn
            return
        job = self._next_to_run()
        self._start_loading()
        if job is None:
            return
        if self._executor.pair_bytes(job.call) <= self._inline_pair_bytes:
            began_s = self._clock()
            self._end(job, self._terminal_frame(job))
            if self._clock() - began_s > limits.INLINE_TURN_S:
                self._pump_later()
        else:
            self._compute_on(self._thread, job)

    def _next_to_run(self) -> Job | None:
        # The next call that has all its experts; those that lack some go to load.
        while True:
            chosen = self._admission.start_next(self._clock())
            for ticket in chosen.expired:
                self._drop(ticket, errors.CallTimeout("its deadline passed before it could start"))
            if chosen.start is None:
                return None
            job = self._jobs[chosen.start.key]
            if self._open(job, self._executor.try_open):
                if job.opened is not None:
                    return job
                self._admission.must_load()

    def _start_loading(self) -> None:
        while True:
            chosen = self._admission.start_loading(self._clock())
            for ticket in chosen.expired:
                self._drop(ticket, errors.CallTimeout("its deadline passed before it could load"))
            if chosen.start is None:
                return
            job = self._jobs[chosen.start.key]
            if self._open(job, self._executor.open):
                self._compute_on(self._loaders, job)

    def _open(self, job: Job, way: Callable[[ExpertCall, int], Opened | None]) -> bool:
        # False: it failed, and is answered.
        try:
            job.opened = way(job.call, job.ticket.stream_id)
            return True
        except Exception as error:  # noqa: BLE001  the top of a call, as in _terminal_frame
            self._end(job, self._failure(job.ticket.call_id, job.call.layer, error))
            return False

    def _compute_on(self, threads: ThreadPoolExecutor, job: Job) -> None:
        threads.submit(self._terminal_frame, job).add_done_callback(
            lambda future: self._loop.call_soon_threadsafe(self._end, job, future.result())
        )

    def _give_up(self, job: Job) -> None:
        job.is_cancelled = True
        if job.opened is not None:
            job.opened.abandon(errors.CallCancelled("cancelled while it waited for its experts"))

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
        if self._admission.num_waiting:
            self._pump_later()

    def _pump_later(self) -> None:
        if not self._is_pump_due:
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
        # The top of a call, on any thread: whatever goes wrong becomes its terminal frame.
        call_id = job.ticket.call_id
        began_s = self._clock()
        try:
            assert job.opened is not None, "computed before it was opened"
            computed = job.opened.compute()
            ended_s = self._clock()
            return wire.reply_frame(
                call_id,
                computed.sums,
                self._executor.grid(job.call.layer),
                job.wire,
                queue_us=_microseconds(began_s - job.ticket.received_s),
                compute_us=_microseconds(ended_s - began_s),
                load_us=_microseconds(computed.load_s),
            )
        except Exception as error:  # noqa: BLE001  the top of a call
            return self._failure(call_id, job.call.layer, error)

    def _failure(self, call_id: int, layer: int, error: Exception) -> bytes:
        if isinstance(error, errors.ShoalError | OSError | MemoryError):
            _log.warning("call failed", call_id=call_id, layer=layer, error=str(error))
            return failure_frame(call_id, error)
        error_id = secrets.token_hex(4)  # what else gets here is our bug
        _log.error("bug", call_id=call_id, layer=layer, error_id=error_id, exc_info=error)
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
            self._set_gate()

    def _set_gate(self) -> None:
        if self._gate is None:
            return
        if self._jobs or self._log_calls or self._admission.is_draining:
            self._gate.shut()
        else:
            self._gate.open()

    def _tick_later(self) -> None:
        if not self._is_ticking:
            self._is_ticking = True
            self._loop.call_later(limits.PROGRESS_INTERVAL_S, self._tick)

    def _tick(self) -> None:
        self._is_ticking = False
        now_s = self._clock()
        for ticket in self._admission.expire(now_s):
            self._drop(ticket, errors.CallTimeout("its deadline passed while it waited"))
        for ticket in self._admission.overdue(now_s):
            opened = self._jobs[ticket.key].opened
            if opened is not None:
                error = errors.CallTimeout("its deadline passed while it waited for its experts")
                opened.abandon(error)
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
