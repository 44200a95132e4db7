"""The native side of a row's fan-out: split by owner, sent and collected on sockets."""

from enum import IntEnum

from shoal._kernels import RowWires, split_row

__all__ = ["RowWires", "Stop", "split_row"]


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
