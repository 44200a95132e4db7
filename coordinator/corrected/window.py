"""What the rows of one layer were when they were last seen, and what their experts answered (core).

Rows keep their places: row t of a window is one token, in every layer and every pass.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from coordinator.array_types import F32, I32, I64
from shoal.router import RoutingPlan
from shoal.rows import Rows

_T = TypeVar("_T", bound=np.generic)

MIN_ROWS = 4  # room at first: a decode step has one


class LayerWindow:
    """Rows of one layer, each with what it asks, the stand-in's sums for that, and the answer.

    An answer belongs to what its row asked last: a row that is noted anew has none.
    """

    def __init__(self) -> None:
        self._asked: Rows | None = None
        self._experts: I32
        self._weights: F32
        self._sums: I64
        self._answers: F32
        self._has_answer: NDArray[np.bool_]

    def note(self, first: int, asked: Rows, plan: RoutingPlan, sums: I64) -> None:
        """Write down rows first, first + 1, ...: what they ask, and the stand-in's sums [T, D]."""
        end = first + asked.num_rows
        mine = self._with_room(end, asked, plan)
        mine.values[first:end] = asked.values
        mine.scales[first:end] = asked.scales
        self._experts[first:end] = plan.experts
        self._weights[first:end] = plan.weights
        self._sums[first:end] = sums
        self._has_answer[first:end] = False

    def asked(self, first: int, end: int) -> tuple[Rows, RoutingPlan]:
        """Return copies of what these rows ask: a call may outlive what is noted next."""
        mine = self._asked
        assert mine is not None, "no row was noted"
        rows = Rows(
            mine.scheme, mine.dim, mine.values[first:end].copy(), mine.scales[first:end].copy()
        )
        plan = RoutingPlan(self._experts[first:end].copy(), self._weights[first:end].copy())
        return rows, plan

    def answer(self, first: int, answers: F32) -> None:
        """Write down what came back for rows first, first + 1, ...: [T, D]."""
        end = first + len(answers)
        self._answers[first:end] = answers
        self._has_answer[first:end] = True

    def sums(self, first: int, end: int) -> I64:
        """Return the stand-in's sums for what these rows asked, [T, D]. A view."""
        return self._sums[first:end]

    def answers(self, first: int, end: int) -> F32:
        """Return what came back for these rows, [T, D]. A view."""
        assert self._has_answer[first:end].all(), "a row has no answer to what it asked last"
        return self._answers[first:end]

    def _with_room(self, end: int, asked: Rows, plan: RoutingPlan) -> Rows:
        """Return the arrays of what is asked, of this geometry and with room for that many rows."""
        mine = self._asked
        if mine is not None and end <= mine.num_rows and asked.scheme is mine.scheme:
            return mine
        room = max(end, MIN_ROWS if mine is None else 2 * mine.num_rows)
        grown = asked.take(np.zeros(room, np.intp))  # of the same geometry; to be overwritten
        experts, weights = _like(plan.experts, room), _like(plan.weights, room)
        sums = np.zeros((room, asked.dim), np.int64)
        answers = np.zeros((room, asked.dim), np.float32)
        has_answer = np.zeros(room, np.bool_)
        if mine is not None:
            old = mine.num_rows
            grown.values[:old], grown.scales[:old] = mine.values, mine.scales
            experts[:old], weights[:old] = self._experts, self._weights
            sums[:old], answers[:old] = self._sums, self._answers
            has_answer[:old] = self._has_answer
        self._asked, self._experts, self._weights = grown, experts, weights
        self._sums, self._answers, self._has_answer = sums, answers, has_answer
        return grown


def _like(array: NDArray[_T], num_rows: int) -> NDArray[_T]:
    return np.zeros((num_rows, array.shape[1]), array.dtype)
