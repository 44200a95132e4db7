"""Populator: pages ahead of use, where nobody is yet, and never in the way of giving them back."""

import errno
import threading
from collections.abc import Callable

import psutil

from shoal.experts.cache.arena import U8, Arena
from shoal.experts.cache.extents import Extents
from shoal.experts.populator import PART_BYTES, Populator
from shoal.limits import MIB
from shoal.ops.reads import populate
from support.held_reader import until


class World:
    """An arena of 32 MiB that somebody populates; steps: the bytes of each that has begun."""

    def __init__(self, populate: Callable[[U8], int] = populate) -> None:
        self.lock = threading.Lock()
        self.extents, self.arena = Extents(), Arena()
        self.arena.grow(self.extents.grow(32 * MIB), 32 * MIB)
        self.extents.set_open_bytes(32 * MIB)
        self.steps_ended = 0
        self.populator = Populator(self.lock, self.extents, self.arena, self.end_step, populate)

    def end_step(self) -> None:
        assert self.lock.locked() and not self.populator.is_busy
        self.steps_ended += 1

    def go_on(self) -> None:
        with self.lock:
            self.populator.go_on()

    def stop(self) -> None:
        with self.lock:
            thread = self.populator.stop()
        if thread is not None:
            thread.join()


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_free_memory_is_there_before_it_is_written_to() -> None:
    world = World()
    before = resident()
    world.go_on()
    until(lambda: world.populator.num_bytes == 32 * MIB and not world.populator.is_busy)
    assert resident() - before > 30 * MIB
    assert not world.arena.view(0, 32 * MIB).any(), "it was written to"


def test_what_is_in_use_is_passed_over_and_keeps_its_bytes() -> None:
    world = World()
    assert world.extents.place(8 * MIB) == 0 and world.extents.place(4 * MIB) == 8 * MIB
    world.arena.view(0, 12 * MIB)[:] = 7
    world.extents.give(0, 8 * MIB)
    world.go_on()
    until(lambda: world.populator.num_bytes == 28 * MIB and not world.populator.is_busy)
    assert (world.arena.view(0, 12 * MIB) == 7).all()


def test_memory_that_is_given_back_and_opened_again_is_populated_again() -> None:
    world = World()
    world.go_on()
    until(lambda: world.steps_ended == 16)
    with world.lock:
        world.extents.set_open_bytes(8 * MIB)
        world.arena.give_back_from(8 * MIB)
        world.populator.note_given_back(8 * MIB)
        world.extents.set_open_bytes(24 * MIB)
    before = resident()
    world.go_on()
    until(lambda: world.steps_ended == 24)
    assert resident() - before > 14 * MIB


def test_one_step_is_all_that_is_waited_for() -> None:
    """1. a step is under way; 2. it is told to stop; 3. the step ends: no other begins."""
    has_begun, may_end = threading.Event(), threading.Event()

    def held(part: U8) -> int:
        assert part.nbytes == PART_BYTES
        has_begun.set()
        may_end.wait(30)
        return 0

    world = World(held)
    world.go_on()
    assert has_begun.wait(30)
    with world.lock:
        assert world.populator.is_busy
        thread = world.populator.stop()
    may_end.set()
    assert thread is not None
    thread.join(30)
    assert world.steps_ended == 1 and not world.populator.is_busy
    world.go_on()
    assert world.populator.num_bytes == PART_BYTES, "it began again"


def test_a_system_without_memory_ends_it_quietly() -> None:
    world = World(lambda part: errno.ENOMEM)
    world.go_on()
    until(lambda: world.steps_ended == 1)
    world.stop()
    assert world.populator.num_bytes == PART_BYTES
