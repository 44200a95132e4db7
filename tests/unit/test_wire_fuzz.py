"""Both ends of the fast transport survive hostile bytes (support/wire_fuzz.py; `make fuzz`)."""

import asyncio
import math
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest

from expert_node.fast_connection import FastConnection
from shoal.http2.connection import Connection
from shoal.http2.frames import Http2Error
from support.wire_fuzz import fuzz

NUM_SEEDS = 400  # some three seconds; `make fuzz` goes on from there


def tried(seeds: Iterator[int]) -> int:
    return asyncio.run(fuzz(seeds, math.inf))


def test_spoiled_conversations_harm_neither_end() -> None:
    assert tried(iter(range(NUM_SEEDS))) == NUM_SEEDS


def forget_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that lets an error of the wire out."""

    def broken(_self: FastConnection, error: Http2Error) -> None:
        raise error

    monkeypatch.setattr(FastConnection, "_break", broken)


def forget_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that keeps the sessions of streams that were reset."""
    monkeypatch.setattr(FastConnection, "_forget", lambda *_: None)


def grow_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that hears nothing after its third stream."""
    receive = Connection.receive

    def deaf(self: Connection, data: bytes, now_s: float) -> object:
        return receive(self, data, now_s) if self._last_remote_id < 5 else []

    monkeypatch.setattr(Connection, "receive", deaf)


@pytest.mark.parametrize("spoil", [forget_errors, forget_streams, grow_deaf])
def test_the_fuzzer_finds_what_is_broken(
    spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises((AssertionError, Http2Error)):
        tried(islice(count(), NUM_SEEDS))
