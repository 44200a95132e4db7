"""The native side of a row's fan-out: split by owner, sent and collected on sockets."""

from enum import IntEnum

from shoal._kernels import RowWires, split_row

__all__ = ["Reply", "RowReport", "RowWires", "SentCall", "Stop", "split_row"]

# As `RowWires` reports. Of a call: lane, slot, number of experts, bytes, errno, what the socket did
# not take. Of a reply: call id, lane, seconds, queue_us, compute_us, load_us, bytes. Of a row: the
# calls sent, why collecting stopped, lane, errno, replies, what is unread of lanes.
SentCall = tuple[int, int, int, int, int, bytes]
Reply = tuple[int, int, float, int, int, int, int]
RowReport = tuple[list[SentCall], int, int, int, list[Reply], list[tuple[int, bytes]]]


class Stop(IntEnum):
    """Why `RowWires` came back.

    DONE: every call is answered. TIME: the patience is over, or a signal came. OTHERS: another
    descriptor has news. UNREAD: a lane brought something else. BROKEN: a lane has ended. UNSENT:
    nothing was collected: a socket did not take all of a call or has ended, or no call was made.
    """

    DONE = 0
    TIME = 1
    OTHERS = 2
    UNREAD = 3
    BROKEN = 4
    UNSENT = 5
