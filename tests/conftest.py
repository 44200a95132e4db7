"""Fixtures for every test: nothing that a test starts may outlive it."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

from shoal.grpc_settings import prepare_grpc
from support.smollm2 import convert_smollm2

# A busy machine is no failure: no deadline an example, and slow generation is no complaint.
# CI replays the same examples every time; at home they are new ones.
settings.register_profile(
    "shoal",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("shoal")

prepare_grpc("ERROR")  # as the commands do, before anybody imports it

GRACE_S = 5.0  # for a thread or process that was told to end and is on its way


def pytest_configure() -> None:
    """Let children see SIGINT and SIGHUP also under `nohup` or `&`, which ignore them.

    An ignored signal is inherited, a handled one is not; a handler that does nothing keeps this
    process as deaf as it was told to be.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def our_children() -> set[psutil.Process]:
    return {
        child
        for child in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(_command(child))  # multiprocessing's, for the session
    }


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ended while we looked
        return []


def _left_by_the_test(before: set[psutil.Process]) -> set[psutil.Process]:
    """Return our new children, but for what older ones started: a wider fixture's, it ends them."""
    return {child for child in our_children() - before if not before & _ancestors(child)}


def _ancestors(process: psutil.Process) -> set[psutil.Process]:
    try:
        return set(process.parents())
    except psutil.Error:  # it ended while we looked
        return set()


@pytest.fixture(autouse=True)
def nothing_outlives_the_test() -> Iterator[None]:
    """Fail a test that leaves a thread or a process behind; wider fixtures' own are theirs."""
    threads, children = set(threading.enumerate()), our_children()
    yield
    left = [t for t in threading.enumerate() if t not in threads and not t.daemon]
    for thread in left:
        thread.join(GRACE_S)
    alive = [thread.name for thread in left if thread.is_alive()]
    _, orphans = psutil.wait_procs(_left_by_the_test(children), GRACE_S)
    described = [f"{process.pid}: {' '.join(_command(process))}" for process in orphans]
    for process in orphans:
        process.kill()
    assert not alive, f"the test left threads: {alive}"
    assert not described, f"the test left processes: {described}"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2 as an artifact; for tests marked `weights`."""
    out: Path = tmp_path_factory.mktemp("smollm2") / "smollm2.shoal"
    convert_smollm2(out)
    return out
