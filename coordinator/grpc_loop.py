"""The one event loop of this process that gRPC runs on, in a thread of its own.

One per process, not one per dispatch: gRPC's Python poller misbehaves with several loops
(grpc/grpc#42357). Started on first use; stopped at exit.
"""

import asyncio
import atexit
import threading

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def grpc_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop. Thread-safe."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = _new_loop()
            thread = threading.Thread(target=_run, args=(_loop,), name="shoal-grpc", daemon=True)
            thread.start()
            atexit.register(_stop, _loop, thread)
        return _loop


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: asyncio's own loop is up to 26 % slower
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=2.0)
