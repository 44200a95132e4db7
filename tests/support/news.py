"""What a coordinator tells, collected, and waiting for it."""

import threading
from collections.abc import Callable

WAIT_S = 120.0  # a busy machine


class News:
    """Hand it over as `notify`. on: what to do, once, when a sentence has those words."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self._came = threading.Condition()
        self.on: dict[str, Callable[[], object]] = {}

    def __call__(self, sentence: str) -> None:
        with self._came:
            self.sentences.append(sentence)
            self._came.notify_all()
        for words, act in list(self.on.items()):
            if words in sentence:
                del self.on[words]
                threading.Thread(target=act).start()  # not here: this is the connections' thread

    def wait(self, *words: str) -> None:
        """Return once a sentence has been told that has all those words."""
        with self._came:
            found = self._came.wait_for(
                lambda: any(all(w in s for w in words) for s in self.sentences), WAIT_S
            )
            assert found, (words, self.sentences)
