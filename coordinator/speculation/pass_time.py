"""Pass time: what a forward pass of r rows takes, learned from the passes that were run (core).

    T(r) = fixed + row * r + expert * D(r)      D(r) = E (1 - (1 - A/E)^r), distinct experts

Round trips are in `fixed`, the wire and attention in `row`, weights read in `expert`. Each number
of rows keeps the median of its last passes (a stall or a cold cache moves nothing). The three
parts, none negative, are fitted to the medians; where a number of rows was run itself, its median
counts the more, the more passes are behind it. Forgetting is by count: a bucket holds few passes,
and one that is not refreshed fades out of the fit.

What was never seen is priced high, so that speculation begins only where it is sure to pay:

    only r = 1 seen            rows as dear as passes: T(r) = r T(1)
    r = 1 and a prompt's chunk    between the two, the whole rise is laid on D(r), whose slope is
                               steepest where drafts are; a half is added on top, but no row is
                               dearer than a pass
    beyond twice the rows seen    rows as dear as those seen, on average
"""

from collections import deque
from collections.abc import Sequence
from itertools import combinations

from shoal import limits

MAX_NEAR_ROWS = 1 + limits.MAX_DRAFT  # what a verify pass runs: a bucket each; more rows share some
_NEAR = range(1, MAX_NEAR_ROWS + 1)
SAMPLES = 5  # of a bucket: two outliers do not move its median
FEW, BEND = 2.5, 1.25  # a median of fewer passes moves the fit by no more than a quarter
FADE = 0.5 ** (1 / 256)  # a pass: a bucket that saw none of the last 256 weighs half
FAR_WEIGHT = 0.05  # of a prefill chunk beside verify passes: it computes one row's logits only
FAR_MARGIN = 1.5  # on the rise read off a prefill chunk alone, for the same reason
LOOK_EVERY = 64  # passes of more rows: then T(1) is due to be seen again: at most 1.6 % of passes
LOOK_SOON = 6  # likewise, while few were seen or after one unlike those before it
SURPRISE = 0.15  # beyond the slowest or quickest T(1) remembered: such a one
REFIT_EVERY = 16  # passes, at first a quarter of those seen: a fit takes some 100 us


class PassTime:
    """Predicts seconds of a pass from its rows.

    Args:
        num_experts, experts_per_token: E >= A >= 1 of a layer; a dense model cut into always-chosen
            slices has E = A.
    """

    def __init__(self, num_experts: int, experts_per_token: int) -> None:
        assert 1 <= experts_per_token <= num_experts, (experts_per_token, num_experts)
        self._num_experts = num_experts
        self._share = experts_per_token / num_experts
        self._buckets: dict[int, _Bucket] = {}
        self._num_passes = 0
        self._fitted_at = 0
        self._plain_at = 0
        self._look_after = LOOK_EVERY
        self._table = [float("inf")] * MAX_NEAR_ROWS  # [r - 1]
        self._parts = (0.0, 0.0, 0.0)

    @property
    def is_known(self) -> bool:
        """Whether passes of one row were seen: before that there is nothing to compare with.

        One that took longer than a chunk of the prompt was slow for a reason of its own: then
        another is waited for.
        """
        plain = self._buckets.get(1)
        if plain is None or len(plain) > 1:
            return plain is not None
        chunks = [bucket.point(0)[1] for rows, bucket in self._buckets.items() if rows > 1]
        return not chunks or plain.point(0)[1] <= min(chunks)

    @property
    def is_due(self) -> bool:
        """Whether a pass of one row is due, as none was seen lately."""
        return self._num_passes - self._plain_at >= self._look_after

    @property
    def num_passes(self) -> int:
        """How many were told of."""
        return self._num_passes

    def distinct_experts(self, num_rows: int) -> float:
        """Return D(r), as if every row chose its experts by itself."""
        return float(self._num_experts * (1.0 - (1.0 - self._share) ** num_rows))

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn what a pass took: prefill chunks, plain steps and verify passes alike."""
        assert num_rows > 0, num_rows
        self._num_passes += 1
        if not seconds > 0.0:
            return  # a clock too coarse to tell
        bucket = self._buckets.get(_key(num_rows))
        if num_rows == 1:
            is_sure = bucket is not None and bucket.is_usual(seconds)
            self._plain_at, self._look_after = (
                self._num_passes,
                LOOK_EVERY if is_sure else LOOK_SOON,
            )
        if bucket is None:
            bucket = self._buckets[_key(num_rows)] = _Bucket()
            self._fitted_at = -REFIT_EVERY
        bucket.add(num_rows, seconds, self._num_passes)

    def predict(self, num_rows: int) -> float:
        """Return seconds, never less for more rows; infinity before a pass of one row was seen."""
        if num_rows <= MAX_NEAR_ROWS:
            return self.table()[num_rows - 1]
        rise = self._shape(num_rows) - self._shape(MAX_NEAR_ROWS)
        return self.table()[-1] + max(0.0, rise)

    def table(self) -> list[float]:
        """Return what `predict` says of 1, 2, .. MAX_NEAR_ROWS rows. Not to be changed."""
        since = self._num_passes - self._fitted_at
        if since and since >= min(REFIT_EVERY, self._num_passes // 4):
            self._refit()
        return self._table

    def parts(self) -> tuple[float, float, float]:
        """Return the fitted seconds (fixed, per row, per distinct expert). For figures."""
        self.table()
        return self._parts

    def _refit(self) -> None:
        self._fitted_at = self._num_passes
        if not self.is_known:
            return
        points = [bucket.point(self._num_passes) for bucket in self._buckets.values()]
        if any(1 < rows <= MAX_NEAR_ROWS for rows, _, _ in points):
            self._parts = self._fit(points)
            self._table = self._corrected(points)
        else:
            self._table = self._conservative(points)

    def _shape(self, num_rows: int) -> float:
        fixed, row, expert = self._parts
        return fixed + row * num_rows + expert * self.distinct_experts(num_rows)

    def _conservative(self, points: "list[_Point]") -> list[float]:
        """Price verify passes before the first of them."""
        plain_s = next(seconds for rows, seconds, _ in points if rows == 1)
        chunks = [(rows, seconds) for rows, seconds, _ in points if rows > 1]
        if not chunks:
            self._parts = (0.0, plain_s, 0.0)
            return [plain_s * rows for rows in _NEAR]
        rows, seconds = min(chunks)
        rise = FAR_MARGIN * max(0.0, seconds - plain_s)
        one = self.distinct_experts(1)
        spread = self.distinct_experts(rows) - one
        expert, row = rise / spread if spread > 1e-9 * one else 0.0, 0.0
        if not expert:
            row = rise / (rows - 1)
        self._parts = (max(0.0, plain_s - row - expert * one), row, expert)
        risen = [row * (r - 1) + expert * (self.distinct_experts(r) - one) for r in _NEAR]
        return [min(plain_s + more, plain_s * r) for r, more in zip(_NEAR, risen, strict=True)]

    def _fit(self, points: "list[_Point]") -> tuple[float, float, float]:
        """Fit the three parts by least squares of relative errors, none negative."""
        weighed = []
        for rows, seconds, weight in points:
            basis = (1.0 / seconds, rows / seconds, self.distinct_experts(rows) / seconds)
            weighed.append((basis, weight if rows <= MAX_NEAR_ROWS else weight * FAR_WEIGHT))
        active = (0, 1, 2) if self._share < 1.0 else (0, 1)
        best, best_error = (0.0, 0.0, 0.0), float("inf")
        for size in range(1, len(active) + 1):
            for columns in combinations(active, size):
                parts = _least_squares(weighed, columns)
                if parts is None or min(parts) < 0.0:
                    continue
                error = sum(
                    weight * (sum(p * b for p, b in zip(parts, basis, strict=True)) - 1.0) ** 2
                    for basis, weight in weighed
                )
                if error < best_error - 1e-12:
                    best, best_error = parts, error
        return best

    def _corrected(self, points: "list[_Point]") -> list[float]:
        """Bend the fit towards what single numbers of rows really took; make it ascend."""
        near = {rows: (seconds, weight) for rows, seconds, weight in points}
        most = max(near)
        table: list[float] = []
        for rows in _NEAR:
            seconds = self._shape(rows)
            if rows in near:
                median_s, weight = near[rows]
                if weight < FEW:  # perhaps a stall
                    median_s = min(seconds * BEND, max(seconds / BEND, median_s))
                seconds += (median_s - seconds) * weight / (weight + 1.0)
            elif rows > 2 * most:
                seconds = max(seconds, table[most - 1] * rows / most)
            table.append(max(seconds, table[-1] if table else 0.0))
        return table


_Point = tuple[int, float, float]  # rows, median seconds, weight


class _Bucket:
    """The last passes of about as many rows."""

    __slots__ = ("_last", "_samples")

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, float]] = deque(maxlen=SAMPLES)
        self._last = 0

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, num_rows: int, seconds: float, now: int) -> None:
        self._samples.append((seconds / num_rows, num_rows, seconds))
        self._last = now

    def is_usual(self, seconds: float) -> bool:
        """Return whether a pass is about as quick as those remembered, and these are some."""
        if len(self._samples) < FEW:
            return False
        quickest = min(sample[2] for sample in self._samples)
        slowest = max(sample[2] for sample in self._samples)
        return quickest * (1.0 - SURPRISE) <= seconds <= slowest * (1.0 + SURPRISE)

    def point(self, now: int) -> _Point:
        """Return the middle pass, the quicker of two, and what it weighs."""
        _, rows, seconds = sorted(self._samples)[(len(self._samples) - 1) // 2]
        return rows, seconds, len(self._samples) * FADE ** (now - self._last)


def _key(num_rows: int) -> int:
    """Return a bucket: small numbers have their own, others share one up to a power of two."""
    return num_rows if num_rows <= MAX_NEAR_ROWS else 1 << (num_rows - 1).bit_length()


def _least_squares(
    weighed: Sequence[tuple[tuple[float, float, float], float]], columns: tuple[int, ...]
) -> tuple[float, float, float] | None:
    """Solve the normal equations of some columns by elimination; None where they are singular."""
    rows = [
        [sum(w * b[i] * b[j] for b, w in weighed) for j in columns]
        + [sum(w * b[i] for b, w in weighed)]
        for i in columns
    ]
    for i, pivot_row in enumerate(rows):
        diagonal = sum(w * b[columns[i]] ** 2 for b, w in weighed)
        if not pivot_row[i] > 1e-9 * diagonal:  # what is left of the column, without the others
            return None
        for row in rows[i + 1 :]:
            factor = row[i] / pivot_row[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot_row[j]
    solution = [0.0] * len(columns)
    for i in reversed(range(len(columns))):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, len(columns)))
        solution[i] = (rows[i][-1] - known) / rows[i][i]
    parts = [0.0, 0.0, 0.0]
    for column, value in zip(columns, solution, strict=True):
        parts[column] = value
    return parts[0], parts[1], parts[2]
