"""LentSockets: connections' sockets while plain calls on them are answered without Python.

A native thread (`kernels/call_server.h`) reads, computes and replies. A connection lends its socket
when nothing but plain calls has come for a while, and has it back before it does anything itself,
or when anything else comes. Nothing is answered so that anybody has to be told of, and nothing
while others are computed: then the worker shuts the gate.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from shoal import limits, ops
from shoal.http2.stream import Bypass
from shoal.log import get_logger
from shoal.ops.call_server import CallServer, Returned

ServedLayers = Sequence[tuple[int, ops.ExpertTable, int]]  # layer, table, grid
_log = get_logger("lent_sockets")


class Lender(Protocol):
    """Whose socket it is: a connection."""

    def on_returned(self, returned: Returned) -> None:
        """Learn that it came back by itself."""
        ...

    def take_back(self) -> None:
        """Take it back now."""
        ...


class LentSockets:
    """See the module. Lives on the loop's thread, but for the figures."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, layers_now: Callable[[], ServedLayers]
    ) -> None:
        """Args: layers_now: which layers' calls may be answered so; none: nothing is lent."""
        self._loop = loop
        self._layers_now = layers_now
        self._server: CallServer | None = None  # made when it is needed
        self._lenders: dict[int, Lender] = {}
        self._is_open = True
        self._may_serve = True

    @property
    def num_lent(self) -> int:
        """Sockets that are lent now."""
        return len(self._lenders)

    @property
    def num_calls(self) -> int:
        """Calls answered since the start."""
        return 0 if self._server is None else self._server.num_calls

    @property
    def num_rows(self) -> int:
        """Their rows."""
        return 0 if self._server is None else self._server.num_rows

    @property
    def num_held(self) -> int:
        """Calls that are being computed."""
        return 0 if self._server is None else int(self._server.is_answering)

    def lend(self, lender: Lender, fd: int, stream_id: int, bypass: Bypass) -> int | None:
        """Have a socket's plain calls answered; return the loan's id, None: not now.

        Nobody else may read from it or write to it until it is back.
        """
        layers = self._layers_now() if self._is_open and self._may_serve else ()
        if not layers or len(self._lenders) >= limits.MAX_LENT_SOCKETS:
            return None
        server = self._server or self._make_server()
        if server is None:
            return None
        server.serve(layers)
        loan_id = server.lend(
            fd, stream_id, bypass.may_receive, bypass.may_send, bypass.max_frame_bytes
        )
        self._lenders[loan_id] = lender
        return loan_id

    def take_back(self, loan_id: int) -> Returned:
        """End a loan that its lender has not been told the end of."""
        assert self._server is not None
        del self._lenders[loan_id]
        returned = self._server.take_back(loan_id)
        assert returned is not None, "told twice"
        return Returned(*returned)

    def take_all_back(self) -> None:
        """End all loans: what may be answered so has changed."""
        for lender in list(self._lenders.values()):
            lender.take_back()
        if self._server is not None:
            self._server.serve(())

    def quiet_s(self, loan_id: int) -> float:
        """Return for how long a lent socket has brought nothing."""
        return 0.0 if self._server is None else self._server.quiet_s(loan_id)

    def shut(self) -> None:
        """Answer nothing until `open`. Waits for a call that is being computed."""
        if self._is_open:
            self._is_open = False
            if self._server is not None:
                self._server.shut()

    def open(self) -> None:
        """Answer again."""
        if not self._is_open:
            self._is_open = True
            if self._server is not None:
                self._server.open()

    def close(self) -> None:
        """End the thread. Nothing is lent any more."""
        assert not self._lenders, "a socket is lent still"
        self._may_serve = False
        if self._server is not None:
            self._loop.remove_reader(self._server.news_fd)
            self._server.close()

    def _make_server(self) -> CallServer | None:
        try:
            server = CallServer(limits.INTERACTIVE_MESSAGE_BYTES, limits.INLINE_PAIR_BYTES)
            self._loop.add_reader(server.news_fd, self._on_news)
        except (OSError, RuntimeError, NotImplementedError) as error:
            _log.warning("calls go the long way: no thread to answer them", error=str(error))
            self._may_serve = False
            return None
        self._server = server
        return server

    def _on_news(self) -> None:
        assert self._server is not None
        for each in self._server.news():
            returned = Returned(*each)
            self._lenders.pop(returned.loan_id).on_returned(returned)
