"""The chaos proxy: when bytes arrive is decided without a clock; that they do, on real sockets."""

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from support.chaos_proxy import (
    FAIR,
    FIRST_WINDOW_BYTES,
    ChaosProxy,
    Direction,
    Link,
    Weather,
    Wire,
    steady,
)

TIMEOUT_S = 60.0


def arrivals(weather: Weather, given: list[tuple[float, int]], seed: int = 1) -> list[float]:
    """When segments given at those times arrive; each in one piece."""
    wire = Wire(random.Random(seed))
    return [wire.pieces(weather, at_s, size)[-1][0] for at_s, size in given]


def test_delay_is_added_and_jitter_stays_in_its_bounds_and_in_order() -> None:
    given = [(n * 0.001, 100) for n in range(200)]
    assert arrivals(Weather(delay_s=0.02), given) == [at + 0.02 for at, _ in given]
    jittered = arrivals(Weather(delay_s=0.02, jitter_s=0.01), given)
    assert jittered == sorted(jittered), "a stream keeps its order"
    late = [got - at for got, (at, _) in zip(jittered, given, strict=True)]
    assert all(0.02 <= s <= 0.031 for s in late) and max(late) - min(late) > 0.005
    assert jittered == arrivals(Weather(delay_s=0.02, jitter_s=0.01), given), "the seed decides"
    assert jittered != arrivals(Weather(delay_s=0.02, jitter_s=0.01), given, seed=2)


def test_bandwidth_spreads_a_burst() -> None:
    assert arrivals(Weather(bytes_per_s=1000), [(0.0, 500), (0.0, 500), (5.0, 100)]) == [
        0.5,
        1,
        5.1,
    ]


def test_wires_that_share_a_link_share_its_bandwidth() -> None:
    """Two nodes, or two lanes of one, behind one uplink: each waits for what the other sent."""
    link, weather = Link(), Weather(bytes_per_s=1000)
    one, other = Wire(random.Random(1), link), Wire(random.Random(2), link)
    assert one.pieces(weather, 0.0, 500) == [(0.5, 500)]
    assert other.pieces(weather, 0.0, 500) == [(1.0, 500)]
    assert one.pieces(weather, 0.9, 100) == [(1.1, 100)]
    assert other.pieces(weather, 5.0, 100) == [(5.1, 100)]


def test_a_late_segment_holds_up_what_follows() -> None:
    given = [(n * 0.01, 100) for n in range(1000)]
    got = arrivals(Weather(late_share=0.05, late_s=0.2), given)
    late = [s - at for s, (at, _) in zip(got, given, strict=True)]
    assert sum(s == pytest.approx(0.2) for s in late) == pytest.approx(50, abs=25)
    assert sum(0 < s < 0.199 for s in late) > 100, "those behind a late one wait for it"
    assert got == sorted(got)


def test_after_a_pause_the_window_is_small_again_and_doubles() -> None:
    weather = Weather(slow_start_rtt_s=0.1)
    fits, doubled = FIRST_WINDOW_BYTES, 3 * FIRST_WINDOW_BYTES
    assert arrivals(weather, [(1.0, fits)]) == [1.0]
    assert arrivals(weather, [(1.0, doubled)]) == [1.1]
    assert arrivals(weather, [(1.0, doubled), (1.15, doubled)]) == [1.1, pytest.approx(1.25)]
    again = arrivals(weather, [(1.0, 100 * fits), (20.0, doubled)])
    assert again[0] == pytest.approx(1.6) and again[1] == 20.1


def test_slices_add_up() -> None:
    pieces = Wire(random.Random(0)).pieces(Weather(slice_bytes=7), 0.0, 100)
    assert [size for _, size in pieces] == [7] * 14 + [2]


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=repeat, args=(peer,), daemon=True).start()

    def repeat(peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(65536):
                    peer.sendall(data)
            except OSError:
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"grpc://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def connect(proxy: ChaosProxy) -> socket.socket:
    host, _, port = proxy.endpoint.removeprefix("grpc://").rpartition(":")
    return socket.create_connection((host, int(port)), TIMEOUT_S)


def ask(end: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=end.sendall, args=(data,))
    sender.start()
    answer = b""
    while len(answer) < len(data):
        answer += end.recv(65536) or pytest.fail("the stream ended")
    sender.join()
    return answer


def test_connections_of_proxies_that_share_links_do_too(echo: str) -> None:
    """Both carry 12,000 bytes, and back. Asked is the link: a loaded machine may take longer."""
    shared = {direction: Link() for direction in Direction}
    forecast = steady(Weather(bytes_per_s=240_000))
    with (
        ChaosProxy(echo, forecast, links=shared) as one,
        ChaosProxy(echo, forecast, links=shared) as other,
    ):
        began_s = time.monotonic()
        for proxy in (one, other):
            with connect(proxy) as end:
                assert ask(end, bytes(12_000)) == bytes(12_000)
    for link in shared.values():
        assert link.send(began_s, 0.0) >= began_s + 0.1


@pytest.mark.parametrize(
    "weather",
    [
        FAIR,
        Weather(delay_s=0.01, jitter_s=0.01),
        Weather(slice_bytes=997, late_share=0.2, late_s=0.01),
        Weather(bytes_per_s=10e6, slow_start_rtt_s=0.005),
    ],
)
def test_bytes_arrive_whole_and_in_order_in_any_weather(echo: str, weather: Weather) -> None:
    data = random.Random(3).randbytes(300_000)
    with ChaosProxy(echo, steady(weather)) as proxy, connect(proxy) as end:
        assert ask(end, data) == data
        assert ask(end, b"more") == b"more"


def test_a_reset_breaks_the_connection_and_the_next_one_works(echo: str) -> None:
    with ChaosProxy(echo, lambda number, _, __: Weather(resets=number == 0)) as proxy:
        with pytest.raises(ConnectionResetError), connect(proxy) as first:
            first.sendall(b"hello")
            if first.recv(100) == b"":
                raise AssertionError("ended politely")
        with connect(proxy) as second:
            assert ask(second, b"hello") == b"hello"


def test_a_one_way_partition_holds_answers_until_it_heals(echo: str) -> None:
    with ChaosProxy(echo, steady(FAIR, Weather(stalls=True))) as proxy, connect(proxy) as end:
        end.sendall(b"hello")
        end.settimeout(0.05)
        with pytest.raises(TimeoutError):
            end.recv(100)
        end.settimeout(TIMEOUT_S)
        proxy.forecast = steady(FAIR)
        assert end.recv(100) == b"hello"


def test_the_weather_may_depend_on_connection_direction_and_time() -> None:
    seen: set[tuple[int, Direction]] = set()

    def forecast(number: int, direction: Direction, since_s: float) -> Weather:
        assert since_s >= 0
        seen.add((number, direction))
        return FAIR

    listener = socket.create_server(("127.0.0.1", 0))
    with listener, ChaosProxy(f"grpc://127.0.0.1:{listener.getsockname()[1]}", forecast) as proxy:
        for _ in range(2):
            with connect(proxy) as end:
                peer, _ = listener.accept()
                with peer:
                    end.sendall(b"x")
                    assert peer.recv(1) == b"x"
    assert seen == {(n, direction) for n in range(2) for direction in Direction}


def test_an_end_passes_through(echo: str) -> None:
    with ChaosProxy(echo) as proxy, connect(proxy) as end:
        end.sendall(b"last")
        end.shutdown(socket.SHUT_WR)
        got = b""
        while data := end.recv(100):
            got += data
        assert got == b"last"


def test_nobody_behind_it_is_a_reset(echo: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        target = f"grpc://127.0.0.1:{nobody.getsockname()[1]}"
    with ChaosProxy(target) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as end:
        end.recv(100)
