"""ReadAhead: the prefetcher of a process. Asks the cores, speaks to the store.

    on_hint    note it; queue reads of what can be read until its call comes
    on_call    settle hints and guess about this call, cancel what it did not need; guess the next
               one, admit guesses and queue their reads: the disk begins them when it has no demand
               left
    on_loaded  the gap begins in which they are read
    on_done    tell the governor what the call cost

Everything happens in the calling thread, most of it while the disk works for that very call. Where
another call is inside, a call goes by unobserved: nobody waits here.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from shoal.experts.call import ExpertCall
from shoal.experts.prefetch.admission import IdleGap, admit, min_probability
from shoal.experts.prefetch.governor import Governor, State
from shoal.experts.prefetch.guesser import CallKind, Guess, Guesser, kind_of
from shoal.experts.prefetch.hints import Hints
from shoal.experts.prefetch.interface import Mode, PrefetchFigures, PrefetchStore
from shoal.limits import MAX_PREFETCH_STREAMS

_LOOK_EVERY = 256  # calls: between two looks at the budget
# What a call costs begins when the one before it ended: what reading ahead does to the work between
# them counts too. Beyond this it is a coordinator far away, whose delays drown everything.
_MAX_JUDGED_GAP_S = 0.02


@dataclass(slots=True)
class _Call:
    kind: CallKind
    began_s: float
    num_experts: int
    guess: Guess | None = None
    is_loaded: bool = False
    is_hinted: bool = False


@dataclass(slots=True)
class _Stream:
    idle_since_s: float | None = None  # its last call waits for no read since then
    issued: tuple[int, frozenset[int]] | None = None  # layer, experts
    ended_s: float | None = None  # its last call


class ReadAhead:
    """A `Prefetcher`.

    Args:
        expert_bytes: by layer: of one expert's read.
        governors: by kind of call; empty: always on.
        hint_governor: of reads that follow hints, judged by the calls that hints named; None: these
            are always followed. One trial at a time: while a guess is on trial, hints are followed
            only if they have won theirs, and nothing is learned about them.
    """

    def __init__(
        self,
        mode: Mode,
        guesser: Guesser,
        store: PrefetchStore,
        expert_bytes: Mapping[int, int],
        governors: Mapping[CallKind, Governor],
        hint_governor: Governor | None = None,
    ) -> None:
        self._mode = mode
        self._guesser = guesser
        self._store = store
        self._expert_bytes = expert_bytes
        self._governors = governors
        self._hint_governor = hint_governor
        self._hints = Hints()
        self._hinted_experts = 0
        self._idle = IdleGap()
        self._lock = threading.Lock()
        self._calls: OrderedDict[tuple[int, int], _Call] = OrderedDict()  # (stream, layer)
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._issued_experts = 0
        self._calls_seen = 0
        self._is_needed = True
        self._is_closed = False

    def on_call(
        self, call: ExpertCall, experts: Sequence[int], now_s: float, stream: int = 0
    ) -> None:
        """See `Prefetcher.on_call`."""
        with self._entered() as is_in:
            if not is_in or call.layer not in self._expert_bytes or self._holds_everything():
                return
            kind = kind_of(call.rows.num_rows)
            state = self._stream(stream)
            gap_s = 0.0 if state.ended_s is None else now_s - state.ended_s
            made = _Call(kind, now_s - min(max(gap_s, 0.0), _MAX_JUDGED_GAP_S), len(experts))
            made.is_hinted = self._settle_hint(call.layer, experts, now_s, stream)
            self._calls[stream, call.layer] = made
            _keep_newest(self._calls)
            governor = self._governors.get(kind)
            if governor is not None and not governor.is_learning:
                self._guesser.forget(stream)
                state.issued = state.idle_since_s = None
                return
            self._observe(state, call, experts, now_s, stream)
            made.guess = self._guesser.guess(stream, call.layer, call.rows)
            may_issue = governor is None or governor.may_issue
            # Its own reads are queued by now. Those of others mean that the disk is busy.
            if may_issue and self._store.num_demand_reads() <= len(experts):
                self._issue(state, made.guess)

    def on_loaded(self, layer: int, now_s: float, stream: int = 0) -> None:
        """See `Prefetcher.on_loaded`."""
        with self._entered() as is_in:
            call = self._calls.get((stream, layer)) if is_in else None
            if call is None or call.guess is None or call.is_loaded:
                return
            call.is_loaded = True
            self._stream(stream).idle_since_s = now_s

    def on_done(self, layer: int, load_s: float, now_s: float, stream: int = 0) -> None:
        """See `Prefetcher.on_done`."""
        with self._entered() as is_in:
            call = self._calls.pop((stream, layer), None) if is_in else None
            if call is None:
                return
            self._stream(stream).ended_s = now_s
            governor, cost_s = self._governors.get(call.kind), now_s - call.began_s
            if call.is_hinted and self._hint_governor is not None and not self._is_guess_on_trial:
                self._hint_governor.on_done(cost_s, call.num_experts)
            if governor is not None:
                governor.on_done(cost_s, call.num_experts)

    def on_hint(self, layer: int, experts: Sequence[int], now_s: float, stream: int = 0) -> None:
        """See `Prefetcher.on_hint`."""
        with self._entered() as is_in:
            if not is_in or layer not in self._expert_bytes or self._holds_everything():
                return
            self._hints.hear(stream, layer, experts, now_s)
            bandwidth = self._store.read_bandwidth()
            if bandwidth <= 0 or self._store.num_demand_reads() or not self._follows_hints:
                return
            read_s = self._expert_bytes[layer] / bandwidth
            absent = self._store.absent(layer, experts)
            admitted = self._hints.admitted(stream, layer, absent, read_s, now_s)
            if admitted:
                num_issued = self._store.prefetch(layer, admitted)
                self._hints.began(stream, layer, admitted[:num_issued], read_s, now_s)
                self._issued_experts += num_issued
                self._hinted_experts += num_issued

    def figures(self) -> PrefetchFigures:
        """See `Prefetcher.figures`."""
        with self._lock:
            issued_bytes, used_bytes, wasted_bytes = self._store.prefetch_bytes()
            decode = self._governors.get(CallKind.ONE)
            prefill, hints = self._governors.get(CallKind.MANY), self._hint_governor
            governors = [governor for governor in (decode, prefill, hints) if governor is not None]
            return PrefetchFigures(
                mode=self._mode,
                predictors=self._guesser.figures(),
                issued_experts=self._issued_experts,
                issued_bytes=issued_bytes,
                used_bytes=used_bytes,
                wasted_bytes=wasted_bytes,
                stall_saved_s=sum(governor.saved_s for governor in governors),
                decode_state=_state_of(decode),
                prefill_state=_state_of(prefill),
                hint_state=_state_of(hints),
                hinted_experts=self._hinted_experts,
                switches=sum(governor.switches for governor in governors),
            )

    def close(self) -> None:
        """See `Prefetcher.close`."""
        with self._lock:
            self._is_closed = True
            self._store.cancel_prefetch()

    @contextmanager
    def _entered(self) -> Iterator[bool]:
        is_in = self._lock.acquire(blocking=False)
        try:
            yield is_in and not self._is_closed
        finally:
            if is_in:
                self._lock.release()

    def _holds_everything(self) -> bool:
        # Asked anew now and then: a budget may change while serving.
        if self._calls_seen % _LOOK_EVERY == 0:
            self._is_needed = self._store.figures().budget_bytes < self._store.num_bytes
        self._calls_seen += 1
        return not self._is_needed

    @property
    def _is_guess_on_trial(self) -> bool:
        governor = self._governors.get(CallKind.FEW)
        return governor is not None and governor.state is State.TRIAL

    @property
    def _follows_hints(self) -> bool:
        governor = self._hint_governor
        if governor is None or governor.state is State.ON:
            return True
        return governor.may_issue and not self._is_guess_on_trial

    def _settle_hint(self, layer: int, experts: Sequence[int], now_s: float, stream: int) -> bool:
        unneeded = self._hints.settle(stream, layer, experts, now_s)
        if unneeded:
            self._store.cancel_prefetch(layer)
        return unneeded is not None

    def _stream(self, stream: int) -> _Stream:
        state = self._streams.setdefault(stream, _Stream())
        self._streams.move_to_end(stream)
        _keep_newest(self._streams)
        return state

    def _observe(
        self,
        state: _Stream,
        call: ExpertCall,
        experts: Sequence[int],
        now_s: float,
        stream: int,
    ) -> None:
        kind = kind_of(call.rows.num_rows)
        wanted = np.array(experts, np.int64)
        self._guesser.settle(stream, call.layer, call.rows.num_rows, wanted)
        if state.idle_since_s is not None:
            self._idle.observe(call.layer, kind, now_s - state.idle_since_s)
        if state.issued is not None:
            layer, issued = state.issued
            unneeded = issued if layer != call.layer else issued.difference(experts)
            if unneeded:
                self._store.cancel_prefetch(layer)
        state.issued = state.idle_since_s = None

    def _issue(self, state: _Stream, guess: Guess) -> None:
        bandwidth = self._store.read_bandwidth()
        if bandwidth <= 0:
            return  # nothing was ever read
        read_s = self._expert_bytes[guess.target] / bandwidth
        gap_s = self._idle.gap_s(guess.target, guess.kind)
        admitted = admit(self._absent(guess), read_s, gap_s)
        if admitted:
            self._issued_experts += self._store.prefetch(guess.target, admitted)
            state.issued = (guess.target, frozenset(admitted))

    def _absent(self, guess: Guess) -> Iterator[tuple[int, float]]:
        num_likely = int(np.count_nonzero(guess.probabilities > min_probability()))
        likely = guess.experts[:num_likely].tolist()
        probability = dict(zip(likely, guess.probabilities[:num_likely].tolist(), strict=True))
        for expert in self._store.absent(guess.target, likely):
            yield expert, probability[expert]


def _state_of(governor: Governor | None) -> str:
    return "forced" if governor is None else governor.state.value


def _keep_newest(
    entries: "OrderedDict[int, _Stream] | OrderedDict[tuple[int, int], _Call]",
) -> None:
    if len(entries) > MAX_PREFETCH_STREAMS:
        entries.popitem(last=False)
