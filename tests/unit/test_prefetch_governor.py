"""The governor finds out whether prefetching wins, and admission what is worth a read."""

from collections.abc import Callable

import numpy as np
import pytest

from shoal.experts.prefetch.admission import (
    MAX_GAP_S,
    VICTIM_WORTH,
    IdleGap,
    admit,
    min_probability,
)
from shoal.experts.prefetch.governor import (
    LEARN_WINDOWS,
    OFF_WINDOWS,
    ON_WINDOWS,
    Governor,
    State,
)

WINDOW, GUARD = 20, 4


def run(governor: Governor, calls: int, cost: Callable[[int, bool], float]) -> list[State]:
    """Feed calls; `cost(call, with_prefetch)`; return the state before each."""
    states: list[State] = []
    for call in range(calls):
        states.append(governor.state)
        governor.on_done(cost(call, governor.may_issue), 1)
    return states


def noisy(seed: int, without: float, with_: float, noise: float) -> Callable[[int, bool], float]:
    rng = np.random.default_rng(seed)
    return lambda _call, issued: (
        (with_ if issued else without) * float(1 + noise * rng.standard_normal())
    )


class TestGovernor:
    def test_it_learns_before_it_tries(self) -> None:
        governor = Governor(WINDOW, GUARD)
        assert (governor.state, governor.is_learning, governor.may_issue) == (
            State.LEARN,
            True,
            False,
        )
        run(governor, LEARN_WINDOWS * WINDOW, lambda _c, _i: 1.0)
        assert (governor.state, governor.is_learning, governor.may_issue) == (
            State.TRIAL,
            False,
            False,
        )
        run(governor, WINDOW, lambda _c, _i: 1.0)
        assert (governor.state, governor.is_learning, governor.may_issue) == (
            State.TRIAL,
            True,
            True,
        )

    @pytest.mark.parametrize("seed", range(5))
    def test_a_gain_switches_it_on_and_it_stays(self, seed: int) -> None:
        governor = Governor(WINDOW, GUARD)
        run(governor, 20 * WINDOW, noisy(seed, 1.0, 0.8, 0.1))
        assert governor.state is State.ON
        states = run(governor, 200 * WINDOW, noisy(seed, 1.0, 0.8, 0.1))
        assert states.count(State.ON) > 0.75 * len(states)
        assert State.OFF not in states
        assert governor.switches == 0
        # 0.2 of each call with it: within a factor of the noise.
        assert 0.6 < governor.saved_s / (0.2 * 200 * WINDOW) < 1.2

    @pytest.mark.parametrize("seed", range(5))
    def test_a_loss_switches_it_off_and_trials_grow_rare(self, seed: int) -> None:
        """A governor that never turns off fails here."""
        governor = Governor(WINDOW, GUARD)
        issued = 0
        cost = noisy(seed, 1.0, 1.3, 0.1)
        for call in range(600 * WINDOW):
            issued += governor.may_issue
            governor.on_done(cost(call, governor.may_issue), 1)
        assert governor.state is State.OFF
        assert not governor.may_issue and not governor.is_learning
        assert issued < 0.02 * 600 * WINDOW, "what a wrong trial costs is bounded"
        assert governor.saved_s < 0

    @pytest.mark.parametrize("seed", range(8))
    def test_no_difference_is_off(self, seed: int) -> None:
        governor = Governor(WINDOW, GUARD)
        states = run(governor, 300 * WINDOW, noisy(seed, 1.0, 1.0, 0.05))
        # Noise may win a trial now and then; the next one takes it back.
        assert states.count(State.ON) < 0.35 * len(states)
        assert State.OFF in states

    def test_drift_is_not_a_gain(self) -> None:
        # A cache that fills: every window costs less than the one before, with or without.
        governor = Governor(WINDOW, GUARD)
        run(governor, 30 * WINDOW, lambda call, _issued: 100.0 - call / 20)
        assert governor.state is State.OFF

    def test_it_notices_when_the_world_changes(self) -> None:
        governor = Governor(WINDOW, GUARD)
        run(governor, 20 * WINDOW, noisy(1, 1.0, 0.7, 0.05))
        assert governor.state is State.ON
        states = run(governor, (ON_WINDOWS + 20) * WINDOW, noisy(2, 1.0, 1.4, 0.05))
        assert states[-1] is State.OFF and governor.switches == 1
        states = run(governor, (OFF_WINDOWS + 16) * WINDOW, noisy(3, 1.0, 0.7, 0.05))
        assert states[-1] is State.ON and governor.switches == 2

    def test_the_calls_after_a_switch_are_not_counted(self) -> None:
        # The first calls of each window pay for the one before: B looks good by A's leftovers.
        governor = Governor(WINDOW, GUARD)
        seen = {"switched": -99, "issued": False}

        def cost(call: int, issued: bool) -> float:
            if issued != seen["issued"]:
                seen.update(switched=call, issued=issued)
            if call - seen["switched"] < GUARD:
                return 0.0 if issued else 50.0
            return 1.1 if issued else 1.0

        run(governor, 16 * WINDOW, cost)
        assert governor.state is State.OFF

    def test_off_is_demand_only_in_truth(self) -> None:
        governor = Governor(WINDOW, GUARD)
        run(governor, (LEARN_WINDOWS + 7) * WINDOW, lambda _call, issued: 2.0 if issued else 1.0)
        for _ in range(OFF_WINDOWS * WINDOW // 2):
            assert governor.state is State.OFF
            assert not governor.is_learning and not governor.may_issue
            governor.on_done(1.0, 8)

    def test_calls_of_many_experts_weigh_as_many(self) -> None:
        # The same cost an expert: calls of 8 experts in A windows, of 2 in B windows.
        governor = Governor(WINDOW, 0)
        for _ in range(30 * WINDOW):
            num = 2 if governor.may_issue else 8
            governor.on_done(0.5 * num, num)
        assert governor.state is State.OFF


class TestLoss:
    """The default never loses: where reading ahead does not win, finding that out costs under 2 %.

    A call is a token; learning costs 3 % of it; what else the machine does wanders (drift) and
    trembles (noise). Losses are against the same calls without any of it.
    """

    @staticmethod
    def losses(effect: float, noise: float, drift: float, tokens: int, seeds: int) -> list[float]:
        found: list[float] = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            steps = np.cumsum(drift * rng.standard_normal(tokens)) / (1 + np.arange(tokens) ** 0.5)
            costs = np.exp(steps + noise * rng.standard_normal(tokens)).tolist()
            governor = Governor(4, 1)
            spent = 0.0
            for cost in costs:
                taken = cost * (1 + 0.03 * governor.is_learning - effect * governor.may_issue)
                spent += taken
                governor.on_done(taken, 1)
            found.append(spent / sum(costs) - 1)
        return found

    @pytest.mark.parametrize(("noise", "drift"), [(0.1, 0.02), (0.2, 0.05), (0.4, 0.1)])
    @pytest.mark.parametrize("effect", [-0.3, -0.05, -0.01, 0.0])
    def test_what_does_not_win_costs_less_than_two_per_cent(
        self, effect: float, noise: float, drift: float
    ) -> None:
        short = self.losses(effect, noise, drift, tokens=225, seeds=40)
        assert sum(short) / len(short) < 0.02, "a short answer: learning and the first trial"
        long = self.losses(effect, noise, drift, tokens=1000, seeds=30)
        assert sum(long) / len(long) < 0.01
        assert max(long) < (0.02 if noise <= 0.2 else 0.05), "in no world"

    def test_what_wins_is_kept(self) -> None:
        for noise, least in ((0.1, 0.14), (0.2, 0.10)):
            gains = self.losses(0.2, noise, 0.02, tokens=1000, seeds=20)
            assert sum(gains) / len(gains) < -least


class TestAdmission:
    def test_a_sure_guess_that_fits_is_read_and_a_doubtful_one_is_not(self) -> None:
        least = min_probability()
        assert admit([(7, least + 0.01)], read_s=1.0, gap_s=1.0) == [7]
        assert admit([(7, least - 0.01)], read_s=1.0, gap_s=1.0) == []

    def test_the_rule_is_gain_against_loss(self) -> None:
        rng = np.random.default_rng(4)
        for _ in range(300):
            p, fits = float(rng.random()), float(rng.random())
            gain = p * fits
            loss = (1 - p) * ((1 - fits) + VICTIM_WORTH)
            assert (admit([(1, p)], 1.0, fits) == [1]) is (gain > loss)

    def test_the_budget_is_the_gap(self) -> None:
        sure = [(expert, 0.9) for expert in range(100)]
        assert admit(sure, read_s=0.002, gap_s=0.010) == [0, 1, 2, 3, 4]
        assert admit(sure, read_s=0.002, gap_s=0.0) == []
        doubtful = [(expert, 0.5) for expert in range(100)]
        assert len(admit(doubtful, read_s=0.004, gap_s=0.010)) == 2, "no doubtful read overruns"
        assert len(admit([(e, 0.99) for e in range(9)], read_s=0.004, gap_s=0.010)) == 3

    def test_the_gap_is_learned_per_layer_and_kind_and_never_a_users_pause(self) -> None:
        idle = IdleGap()
        assert idle.gap_s(1, 0) == 0.0
        for _ in range(60):
            idle.observe(1, 0, 0.004)
            idle.observe(1, 2, 0.02)
            idle.observe(2, 0, 30.0)
            idle.observe(3, 0, -1.0)
        assert idle.gap_s(1, 0) == pytest.approx(0.004)
        assert idle.gap_s(1, 2) == pytest.approx(0.02)
        assert idle.gap_s(2, 0) == MAX_GAP_S
        assert idle.gap_s(3, 0) == 0.0
