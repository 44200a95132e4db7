"""Workers: a few threads for what the thread that takes completions should not wait for."""

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Workers:
    """Daemon threads, started as they are needed. Tasks must not raise."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_waiting = 0  # tasks not ended; a hint: read without a lock
        self._lock = threading.Lock()

    @property
    def is_crowded(self) -> bool:
        """Whether more than one task is under way or waits."""
        return self._num_waiting > 1

    def submit(self, task: Callable[[], None]) -> None:
        """Have a thread run it, in the order submitted. Not after `close`."""
        with self._lock:
            self._num_waiting += 1
            if len(self._threads) < min(self._num_waiting, self._num_threads):
                name = f"{self._name}-{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        self._tasks.put(task)

    def close(self) -> None:
        """Wait for what was submitted, and end the threads. Safe to call again."""
        with self._lock:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            with self._lock:
                self._num_waiting -= 1
