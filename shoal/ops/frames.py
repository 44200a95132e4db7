"""The native side of shoal/wire.py: frames of calls and replies, written and read in one go."""

from shoal._kernels import (
    CallView,
    ReplyView,
    add_reply,
    call_frame,
    read_call,
    read_reply,
    reply_frame,
)

__all__ = [
    "CallView",
    "ReplyView",
    "add_reply",
    "call_frame",
    "read_call",
    "read_reply",
    "reply_frame",
]
