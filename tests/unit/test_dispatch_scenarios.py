"""Replays tests/scenarios/*.txt against the dispatch core.

A scenario is a story of blocks `command / ---- / expected output`, after etcd-raft's interaction
tests. Nodes are numbers; a call is `CALL@NODE|NODE` or `CALL@NODE:BYTES`, the preferred replica
first; a call from 101 to 999 travels in bulk. Further attempts are `retry-1`, `retry-2`, ... Run
with REWRITE=1 to accept new output; read the diff before committing it.
"""

import os
import re
from pathlib import Path

import pytest

from coordinator.dispatch import Dispatcher
from coordinator.dispatch_attempts import FIRST_RETRY_ID
from coordinator.dispatch_events import (
    Accept,
    Cancel,
    CloseNode,
    Command,
    Event,
    Fail,
    Failed,
    FanoutAbandoned,
    FanoutStarted,
    Finish,
    GiveUpWaiting,
    Lane,
    NewCall,
    NodeAbsent,
    NodeDraining,
    NodeLost,
    NodeOpened,
    NodeRetired,
    Progressed,
    ReleaseNode,
    Replied,
    Send,
    Ticked,
    TimeOut,
)
from shoal import errors

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))
BLOCK = re.compile(r"^(?P<command>[a-z].*)\n----\n(?P<expected>(?:.+\n)+)", re.MULTILINE)
CALL_TIMEOUT_S, SHARD_WAIT_S = 10.0, 30.0


def lane_of(call_id: int) -> Lane:
    return Lane.BULK if 100 < call_id < 1000 else Lane.INTERACTIVE


def new_call(text: str) -> NewCall:
    call_id, _, rest = text.partition("@")
    nodes, _, num_bytes = rest.partition(":")
    candidates = tuple(map(int, nodes.split("|")))
    return NewCall(int(call_id), candidates, lane_of(int(call_id)), int(num_bytes or 10), 1.0)


def attempt_of(text: str) -> int:
    retry = text.removeprefix("retry-")
    return int(text) if retry == text else FIRST_RETRY_ID + int(retry) - 1


def show_attempt(attempt_id: int) -> str:
    return (
        str(attempt_id)
        if attempt_id < FIRST_RETRY_ID
        else f"retry-{attempt_id - FIRST_RETRY_ID + 1}"
    )


class Story:
    """Turns commands of a scenario into events; `time` moves its clock."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def parse(self, command: str) -> list[Event]:
        now_s = self.now_s
        match command.split():
            case ["open", node, credit, *rest]:
                is_same = rest == ["same-process"]
                return [NodeOpened(int(node), int(credit), 0.001, is_same, now_s)]
            case ["know", node, latency]:
                return self.teach(int(node), float(latency))
            case ["start", fanout, *calls]:
                return [FanoutStarted(int(fanout), tuple(map(new_call, calls)), now_s)]
            case ["abandon", fanout]:
                return [FanoutAbandoned(int(fanout))]
            case ["reply", call, node]:
                return [Replied(attempt_of(call), int(node), now_s)]
            case ["progress", node, *calls]:
                return [Progressed(int(node), tuple(map(attempt_of, calls)), now_s)]
            case ["fail", call, node, kind]:
                is_final = kind == "MalformedMessage"
                error = getattr(errors, kind)("it said so")
                return [Failed(attempt_of(call), int(node), error, is_final, now_s)]
            case ["lose", node, *rest]:
                broke = rest == ["for-nonsense"]
                return [NodeLost(int(node), errors.NodeUnreachable("lost"), broke, now_s)]
            case ["absent", node]:
                return [NodeAbsent(int(node), errors.NodeUnreachable("absent"), now_s)]
            case ["drain", node]:
                return [NodeDraining(int(node), errors.NodeDraining("draining"), now_s)]
            case ["retire", node]:
                return [NodeRetired(int(node), errors.NodeUnreachable("retired"))]
            case ["time", now]:
                self.now_s = float(now)
                return [Ticked(self.now_s)]
        raise ValueError(f"no such command: {command!r}")

    def teach(self, node: int, latency_s: float) -> list[Event]:
        """Let the core see forty quick calls of a node, so that it has a model of it."""
        events: list[Event] = []
        for n in range(40):
            call = NewCall(10**6 * (node + 1) + n, (node,), Lane.INTERACTIVE, 1, 1.0)
            events.append(FanoutStarted(call.call_id, (call,), self.now_s))
            self.now_s += latency_s
            events.append(Replied(call.call_id, node, self.now_s))
        return events


def show(command: Command) -> str:
    match command:
        case Send(attempt, call, node, lane):
            again = "" if attempt == call else f" as {show_attempt(attempt)}"
            return f"send {call} -> {node} ({lane.name.lower()}){again}"
        case Cancel(attempt, node, _):
            return f"cancel {show_attempt(attempt)} at {node}"
        case Accept(call):
            return f"accept {call}"
        case Finish(fanout):
            return f"finish {fanout}"
        case Fail(fanout, call, error):
            return f"fail {fanout}: {type(error).__name__} of call {call}: {error}"
        case TimeOut(fanout, call, node):
            return f"time out {fanout}: call {call} at node {node}"
        case GiveUpWaiting(fanout, call, causes):
            return f"give up {fanout}: nobody for call {call}: {'; '.join(map(str, causes))}"
        case CloseNode(node, silent_s):
            return f"close {node}: silent for {silent_s:.2f} s"
        case ReleaseNode(node):
            return f"release {node}"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    dispatcher, story = Dispatcher(CALL_TIMEOUT_S, SHARD_WAIT_S), Story()
    text = path.read_text()

    def replay(block: re.Match[str]) -> str:
        lines = []
        for event in story.parse(block["command"]):
            commands = dispatcher.on(event)
            if not block["command"].startswith("know"):
                lines += [show(command) for command in commands]
            dispatcher.check_integrity()
        return f"{block['command']}\n----\n" + "\n".join(lines or ["(nothing)"]) + "\n"

    replayed, blocks = BLOCK.subn(replay, text)
    assert blocks > 0, f"{path.name} holds no scenario"
    if os.environ.get("REWRITE"):
        path.write_text(replayed)
    assert replayed == text


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 14
