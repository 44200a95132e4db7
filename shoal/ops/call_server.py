"""The native side of a node's quickest way: plain calls answered on lent sockets."""

from enum import IntEnum
from typing import NamedTuple

from shoal._kernels import CallServer

__all__ = ["CallServer", "Returned", "Why"]


class Why(IntEnum):
    """Why a socket came back.

    ASKED: it was taken back. OTHER: what is unread is no plain call, or is none now. REPLY: the
    reply does not fit in the peer's windows. FULL: the socket is full. ENDED: the peer closed it,
    or it broke.
    """

    ASKED = 0
    OTHER = 1
    REPLY = 2
    FULL = 3
    ENDED = 4


class Returned(NamedTuple):
    """A socket that came back, and what happened on it: `CallServer.take_back`, `CallServer.news`.

    error: an errno, 0: none. num_calls: answered, each by one reply, of which `reply` was not sent.
    received_bytes, sent_bytes: of messages with their prefixes. quiet_s: since it was last heard.
    unread: bytes that nobody has acted on. unsent: the end of a frame that counts as sent.
    """

    loan_id: int
    why: int
    error: int
    num_calls: int
    received_bytes: int
    sent_bytes: int
    quiet_s: float
    unread: bytes
    unsent: bytes
    reply: bytes
