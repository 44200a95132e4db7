"""Lead: a draft that goes on, on a thread of its own, while the pass that verifies it runs.

    next()* -> go_on(guesses behind the draft) -> stop() -> next()* ...      close() at any time

A pass over a long link is all waiting. If every guess of a draft turns out right, and the first one
behind it too, those that follow are there already and the next draft begins with them. Else they
were in vain, and cost nothing but processor time that nobody wanted.
"""

import threading
from collections.abc import Callable, Generator

from coordinator.cancellation import Cancellation, Cancelled
from coordinator.speculation.interface import DraftToken
from shoal import limits
from shoal.errors import ShoalError


class LinkedCancellation(Cancellation):
    """Is requested when it is, or another one."""

    def __init__(self, other: Cancellation) -> None:
        super().__init__()
        self._other = other

    @property
    def is_requested(self) -> bool:
        return super().is_requested or self._other.is_requested

    def check(self) -> None:
        """Raise Cancelled if somebody asked for either."""
        super().check()
        self._other.check()


class Lead:
    """The open iterator of a drafter. Used by the engine's thread; owns its own one."""

    def __init__(
        self,
        draft: Callable[[Cancellation], Generator[DraftToken, None, None]],
        cancellation: Cancellation,
    ) -> None:
        """Args: draft: begins to draft; cancellation: of the request."""
        self._cancellation = LinkedCancellation(cancellation)
        self._guesses = draft(self._cancellation)
        self._num_made = 0
        self._behind: list[DraftToken] = []
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._failure: BaseException | None = None

    def next(self) -> DraftToken | None:
        """Return one more guess; None: there are no more. Raises what the drafter does.

        The number is limited: a drafter holds room for so many.
        """
        assert self._thread is None, "it is going on by itself"
        return self._next()

    def go_on(self, behind: list[DraftToken]) -> None:
        """Make guesses on a thread until `stop`; `behind`: those made, and not to be verified."""
        assert self._thread is None, "it is going on already"
        self._behind = list(behind)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="draft-ahead", daemon=True)
        self._thread.start()

    def stop(self, token_id: int) -> list[DraftToken]:
        """Return the guesses that follow the draft, when the one being made is there.

        Args: token_id: what really came behind the draft; none where the first guess is another.
        """
        self._is_stopping = True
        if self._behind and self._behind[0].token_id != token_id:
            self.close()  # nothing here is worth waiting for
            return []
        self._join()
        is_right = bool(self._behind) and self._behind[0].token_id == token_id
        return self._behind[1:] if is_right else []

    def close(self) -> None:
        """End the guess that is being made, and let go of what the drafter holds."""
        self._cancellation.request()
        try:
            self._join()
        finally:
            self._guesses.close()

    def _next(self) -> DraftToken | None:
        if self._num_made == limits.MAX_LEAD:
            return None
        self._num_made += 1
        return next(self._guesses, None)

    def _run(self) -> None:
        try:
            while not self._is_stopping and (guess := self._next()) is not None:
                self._behind.append(guess)
        except (Cancelled, ShoalError):
            return  # nothing more from here; if it fails for good, the next draft tells of it
        except BaseException as error:  # noqa: BLE001  a bug: raised where the engine would see it
            self._failure = error

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
