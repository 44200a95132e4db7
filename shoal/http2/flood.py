"""How much a peer may ask of a connection without carrying any message (core)."""

from shoal import limits
from shoal.http2.frames import Code, Http2Error

# gRPC probes the bandwidth with a PING a round trip while messages flow, and sends a WINDOW_UPDATE
# for some kilobytes of them: this is far from both. An idle peer needs two frames a minute.
EARNED_PER_MESSAGE = 16
BYTES_THAT_EARN_ONE = 1024
EARNED_PER_SECOND = 100.0


class FloodGuard:
    """A token bucket: frames that carry nothing cost one, messages and time earn some."""

    def __init__(self) -> None:
        self._tokens = float(limits.MAX_H2_CONTROL_FRAMES)
        self._last_s: float | None = None

    def at(self, now_s: float) -> None:
        """Note the time."""
        if self._last_s is not None:
            self._earn((now_s - self._last_s) * EARNED_PER_SECOND)
        self._last_s = now_s

    def on_message(self, num_bytes: int, num_messages: int = 1) -> None:
        """A message was received or sent, or so many of these bytes together."""
        if self._tokens < limits.MAX_H2_CONTROL_FRAMES:
            self._earn(num_messages * EARNED_PER_MESSAGE + num_bytes // BYTES_THAT_EARN_ONE)

    def on_control(self, what: str) -> None:
        """A frame that carries nothing arrived. Raises Http2Error when there are too many."""
        self._tokens -= 1
        if self._tokens < 0:
            raise Http2Error(Code.ENHANCE_YOUR_CALM, f"a flood of frames, the last one {what}")

    def _earn(self, tokens: float) -> None:
        self._tokens = min(self._tokens + max(0.0, tokens), float(limits.MAX_H2_CONTROL_FRAMES))
