"""Replays tests/scenarios/*.txt against the dispatch core.

A scenario is a story of blocks `command / ---- / expected output`, after etcd-raft's interaction
tests. Nodes are numbers, calls are `CALL@NODE` or `CALL@NODE:BYTES`; a call above 100 travels in
bulk. Run with REWRITE=1 to accept new output; read the diff before committing it.
"""

import os
import re
from pathlib import Path

import pytest

from coordinator.dispatch import (
    Accept,
    Cancel,
    Command,
    Dispatcher,
    Event,
    Fail,
    Failed,
    FanoutAbandoned,
    FanoutStarted,
    Finish,
    Lane,
    LaneOpened,
    NewCall,
    NodeDraining,
    NodeLost,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from shoal import errors

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))
BLOCK = re.compile(r"^(?P<command>[a-z].*)\n----\n(?P<expected>(?:.+\n)+)", re.MULTILINE)


def lane_of(call_id: int) -> Lane:
    return Lane.BULK if call_id > 100 else Lane.INTERACTIVE


def new_call(text: str) -> NewCall:
    call_id, _, rest = text.partition("@")
    node, _, num_bytes = rest.partition(":")
    return NewCall(int(call_id), int(node), lane_of(int(call_id)), int(num_bytes or 10))


def parse(command: str) -> list[Event]:
    match command.split():
        case ["open", node, credit]:
            return [LaneOpened(int(node), lane, int(credit)) for lane in Lane]
        case ["start", fanout, deadline, *calls]:
            new_calls = tuple(map(new_call, calls))
            return [FanoutStarted(int(fanout), new_calls, float(deadline.removeprefix("until=")))]
        case ["abandon", fanout]:
            return [FanoutAbandoned(int(fanout))]
        case ["reply", call, node]:
            return [Replied(int(call), int(node))]
        case ["fail", call, node, kind]:
            return [Failed(int(call), int(node), getattr(errors, kind)())]
        case ["lose", node]:
            return [NodeLost(int(node), errors.NodeUnreachable())]
        case ["drain", node]:
            return [NodeDraining(int(node), errors.NodeDraining())]
        case ["time", now]:
            return [Ticked(float(now))]
    raise ValueError(f"no such command: {command!r}")


def show(command: Command) -> str:
    match command:
        case Send(call, node, lane):
            return f"send {call} -> {node} ({lane.name.lower()})"
        case Cancel(call, node, _):
            return f"cancel {call} at {node}"
        case Accept(call):
            return f"accept {call}"
        case Finish(fanout):
            return f"finish {fanout}"
        case Fail(fanout, node, error):
            return f"fail {fanout}: {type(error).__name__} of node {node}"
        case TimeOut(fanout, node):
            return f"time out {fanout}: node {node}"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    dispatcher = Dispatcher()
    text = path.read_text()

    def replay(block: re.Match[str]) -> str:
        lines = []
        for event in parse(block["command"]):
            lines += [show(command) for command in dispatcher.on(event)]
            dispatcher.check_integrity()
        return f"{block['command']}\n----\n" + "\n".join(lines or ["(nothing)"]) + "\n"

    replayed, blocks = BLOCK.subn(replay, text)
    assert blocks > 0, f"{path.name} holds no scenario"
    if os.environ.get("REWRITE"):
        path.write_text(replayed)
    assert replayed == text


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 8
