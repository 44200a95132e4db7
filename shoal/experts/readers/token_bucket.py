"""TokenBucket: so many bytes a second, in bursts of a few milliseconds (core)."""

BURST_S = 0.02  # what may be taken at once after a pause, in seconds of the rate


class TokenBucket:
    """Grants while it is not in debt, so one grant may exceed the burst: the average holds."""

    def __init__(self, per_s: float | None) -> None:
        """per_s: the rate; None grants everything."""
        self.per_s = per_s
        self._tokens = 0.0
        self._at_s: float | None = None

    def set_rate(self, per_s: float | None) -> None:
        """Change the rate. Raises ValueError unless it is positive."""
        if per_s is not None and not per_s > 0:
            raise ValueError(f"a bandwidth of {per_s} bytes a second: it must be positive")
        self.per_s = per_s
        self._tokens = 0.0

    def delay_s(self, now_s: float) -> float:
        """Return how long to wait before the next `take`; 0.0: not at all."""
        if self.per_s is None:
            return 0.0
        self._fill(now_s)
        # Less than a byte is rounding: waiting for it would be no time at all, again and again.
        return -self._tokens / self.per_s if self._tokens <= -1.0 else 0.0

    def take(self, amount: int, now_s: float) -> None:
        """Spend, into debt if need be."""
        if self.per_s is not None:
            self._fill(now_s)
            self._tokens -= amount

    def _fill(self, now_s: float) -> None:
        assert self.per_s is not None
        earned = 0.0 if self._at_s is None else (now_s - self._at_s) * self.per_s
        self._tokens = min(self._tokens + earned, self.per_s * BURST_S)
        self._at_s = now_s
