"""The native side of a row's fan-out: split by owner, sent and collected on sockets."""

from enum import IntEnum

from shoal._kernels import collect_row, send_row, split_row

__all__ = ["Stop", "collect_row", "send_row", "split_row"]


class Stop(IntEnum):
    """Why `collect_row` came back.

    DONE: every call is answered. TIME: the patience is over, or a signal came. OTHERS: another
    descriptor has news. UNREAD: a lane brought something else. BROKEN: a lane has ended.
    """

    DONE = 0
    TIME = 1
    OTHERS = 2
    UNREAD = 3
    BROKEN = 4
