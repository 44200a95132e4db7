"""Healthy nodes of a busy machine keep their standing; a node that is really slow loses it soon."""

import pytest

from support.busy_nodes import BusyWorld

WARM_UP = 400  # calls


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_a_busy_machine_demotes_nobody(num_nodes: int) -> None:
    """Five times a second a node does not run for 5 ms on average: ten times what a call takes."""
    for seed in range(3):
        world = BusyWorld(seed, num_nodes=num_nodes, stalls_per_s=5.0)
        for _ in range(4000):
            world.call()
            assert not any(map(world.is_demoted, range(num_nodes)))
        assert world.num_hedges > 5, "nothing happened"


@pytest.mark.parametrize("duty", [(0.01, 0.1), (0.005, 0.05)])
def test_one_long_stall_is_enough_to_be_asked_last_for_a_while(duty: tuple[float, float]) -> None:
    for seed in range(4):
        world = BusyWorld(seed)
        for _ in range(WARM_UP):
            world.call()
        slow = world.nodes[0]
        slow.duty = duty
        before = slow.num_calls
        while not world.rests(0):
            world.call()
            assert slow.num_calls - before <= 10
        asked = slow.num_calls
        while world.rests(0):
            world.call()
        assert slow.num_calls - asked <= 1, "asked while it rested"


def test_a_quiet_machine_hedges_next_to_nothing() -> None:
    world = BusyWorld(1)
    for _ in range(2000):
        world.call()
    assert world.num_hedges < 10


@pytest.mark.parametrize("stalls_per_s", [0.0, 5.0])
@pytest.mark.parametrize("warm_up", [0, WARM_UP])
def test_all_layers_at_once_are_no_slowness(warm_up: int, stalls_per_s: float) -> None:
    """Sixty calls at a time, after none or many that came alone: the last waits for all others."""
    for seed in range(3):
        world = BusyWorld(seed, stalls_per_s=stalls_per_s)
        for _ in range(warm_up):
            world.call()
        before = world.num_hedges
        for _ in range(60):
            world.call(at_once=60)
            assert not any(map(world.is_demoted, range(2)))
        assert world.num_hedges - before <= (0.01 if stalls_per_s else 0.001) * 60 * 60
        for _ in range(warm_up):
            world.call()
            assert not any(map(world.is_demoted, range(2)))


@pytest.mark.parametrize("stalls_per_s", [0.0, 5.0])
@pytest.mark.parametrize("work_s", [0.0006, 0.004])
@pytest.mark.parametrize(
    ("slowness", "duty"),
    [(10.0, None), (1.0, (0.01, 0.1)), (1.0, (0.001, 0.01)), (1.0, (0.005, 0.05))],
)
def test_a_node_with_a_tenth_of_a_cpu_is_demoted_within_ten_calls(
    slowness: float, duty: tuple[float, float] | None, work_s: float, stalls_per_s: float
) -> None:
    """However the tenth is dealt out: always a bit, or all at once. Twenty in noise."""
    for seed in range(4):
        world = BusyWorld(seed, work_s=work_s, stalls_per_s=stalls_per_s)
        for _ in range(WARM_UP):
            world.call()
        slow = world.nodes[0]
        slow.slowness, slow.duty = slowness, duty
        before = slow.num_calls
        while not world.is_demoted(0):
            world.call()
            assert slow.num_calls - before <= (20 if stalls_per_s else 10)
        before = slow.num_calls
        for _ in range(WARM_UP):
            world.call()
        assert slow.num_calls - before < WARM_UP / 20, "it is asked no more"
