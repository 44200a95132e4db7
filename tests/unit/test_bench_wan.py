"""What the bench behind a home link makes of its measurements, and its replayed luck."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bench.page import put
from bench.wan.drawing import draw_sweep
from bench.wan.figures import repetition, totals
from bench.wan.measure_modes import stretched
from bench.wan.modes import BARE
from bench.wan.page import BLOCKS, PAGE
from bench.wan.prompts import FOLDER, KINDS
from bench.wan.replay import Replay, ReplayDrafter
from bench.wan.sweep import compared
from bench.wan.synthetic import (
    LINK,
    REAL,
    WIDE,
    Way,
    bytes_a_token_reads,
    shadow_bytes,
    shadow_shares,
)
from coordinator.cancellation import Cancellation
from coordinator.kv_cache import KvBlockPool
from coordinator.request import GenerationRequest
from coordinator.sequence import Sequence
from shoal.ops import SamplingParams
from shoal.quant import Format


def test_repetition_is_the_share_of_three_grams_that_came_before() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4), "123 again, of 123 231 312 123"
    assert repetition([7, 7, 7, 7, 7]) == pytest.approx(2 / 3)
    assert repetition([1, 2]) == 0.0, "too short for any"


def test_the_repetition_of_an_answer_counts_what_the_prompt_said() -> None:
    prompt = [1, 2, 3, 4]
    assert repetition([*prompt, 2, 3, 4], len(prompt)) == pytest.approx(1 / 3), (
        "234, of 342 423 234"
    )
    assert repetition([*prompt, 5, 6, 7], len(prompt)) == 0.0


def result(num_tokens: int, first_token_s: float, decode_s: float, passes: int) -> dict[str, Any]:
    return {
        "token_ids": list(range(num_tokens)),
        "first_token_s": first_token_s,
        "decode_s": decode_s,
        "passes": passes,
        "drafted": 2 * passes,
        "accepted": num_tokens - 1 - passes,
        "prefill_round_trips": 30,
        "decode_round_trips": 30 * passes,
    }


def test_totals_are_all_tokens_by_all_time_and_no_mean_of_rates() -> None:
    both = totals([result(11, 1.0, 9.0, 10), result(31, 1.0, 9.0, 10)])
    assert both.tokens_per_s == pytest.approx(42 / 20)
    assert both.decode_tokens_per_s == pytest.approx(40 / 18)
    assert both.tokens_per_pass == pytest.approx(2.0)
    assert both.accepted_per_pass == pytest.approx(1.0)
    assert both.round_trips_per_token == pytest.approx((60 + 600) / 42)
    assert both.pass_s == pytest.approx(0.9)


def test_an_answer_of_one_token_has_no_pass_to_speak_of() -> None:
    alone = totals([result(1, 1.5, 0.0, 0)])
    assert alone.tokens_per_s == pytest.approx(1 / 1.5)
    assert alone.decode_tokens_per_s == alone.tokens_per_pass == alone.pass_s == 0.0


def test_a_block_of_the_page_is_replaced_and_nothing_else() -> None:
    page = "a\n<!-- modes -->\nold\n<!-- end -->\nb\n<!-- sweep -->\n<!-- end -->\nc\n"
    once = put(page, "modes", "new")
    assert once == "a\n<!-- modes -->\nnew\n<!-- end -->\nb\n<!-- sweep -->\n<!-- end -->\nc\n"
    assert put(once, "modes", "new") == once
    with pytest.raises(AssertionError, match="no block"):
        put(page, "missing", "new")


def test_the_page_has_every_block_and_every_kind_two_prompts() -> None:
    text = PAGE.read_text("utf-8")
    assert all(f"<!-- {block} -->" in text for block in BLOCKS)
    for kind in KINDS:
        texts = {path.read_text("utf-8") for path in FOLDER.glob(f"{kind}-*.txt")}
        assert len(texts) >= 2, kind


def test_replayed_luck_is_right_as_often_as_was_recorded_at_that_position() -> None:
    """The answer is 10 11 12 ...; two of its tokens are there; recorded: 1, 2, 3 right guesses."""
    answer = list(range(10, 30))
    drafter = ReplayDrafter(0.0, 1000, vocab_size=64)
    drafter.replay = Replay([{"run": n, "chances": [0.9, 0.5, 0.25]} for n in (1, 2, 3)], answer)
    drafter.begin(GenerationRequest((1, 2, 3), 20, SamplingParams()))
    sequence = Sequence(KvBlockPool(2))
    sequence.extend([1, 2, 3, 10])
    for num_right, begin in ((1, 1), (2, 2), (3, 3), (1, 4)):
        guesses = list(islice(drafter.draft(sequence, Cancellation()), 5))
        right = [g.token_id == answer[begin + i] for i, g in enumerate(guesses)]
        assert right == [index < num_right for index in range(3)]
        assert [guess.chance for guess in guesses] == [0.9, 0.5, 0.25]
        sequence.extend([answer[begin]])


def test_a_mode_that_ran_a_share_is_reckoned_up_to_the_whole_answer() -> None:
    """Eleven tokens in 1 + 9 s; of 31 the prompt's time is the same, the decode's three times."""
    whole = stretched(result(11, 1.0, 9.0, 10), range(31))
    assert totals([whole]).seconds == pytest.approx(28.0)
    assert totals([whole]).decode_tokens_per_s == pytest.approx(10 / 9), "as measured"
    assert totals([whole]).round_trips_per_token == pytest.approx((30 + 900) / 31)


def swept(decode_tokens_per_s: float, decode_round_trips: int) -> dict[str, Any]:
    given = result(11, 1.0, 10 / decode_tokens_per_s, 10)
    given |= {"decode_round_trips": decode_round_trips, "tokens_per_pass": 1.0}
    given |= {"prompt": "code-rename", "temperature": 0.0, "measured_tokens": 11}
    return {**given, "decode_tokens_per_s": decode_tokens_per_s, "local_expert_bytes": 47_185_920}


@pytest.mark.parametrize(
    ("rtt_s", "rate", "round_trips", "holds"),
    [
        (0.020, 0.98, 400, True),  # 300 are off's: what counts here is time
        (0.020, 0.96, 200, False),
        (0.005, 0.50, 305, True),
        (0.005, 1.50, 310, False),  # drafting asked nodes in vain
    ],
)
def test_slower_than_off_is_told_by_time_or_where_that_is_noise_by_round_trips(
    rtt_s: float, rate: float, round_trips: int, holds: bool
) -> None:
    off = [swept(1.0, 300), swept(1.0, 300)]
    row = compared(rtt_s, BARE, [swept(2.0, 150), swept(rate, round_trips)], off)
    assert row["holds"] is holds
    assert row["local_expert_bytes"] == 47_185_920


def test_the_sweep_names_the_bytes_of_what_drafts(tmp_path: Path) -> None:
    off = [swept(1.0, 300)]
    rows = [compared(rtt_s, BARE, [swept(2.0, 150)], off) for rtt_s in (0.02, 0.1)]
    assert "47.2 MB" in BLOCKS["sweep"][1]({"rows": rows})
    draw_sweep(tmp_path / "sweep.svg", rows, {"larql": (0.045, 0.7)})
    assert f"{BARE.name} (47 MB)" in (tmp_path / "sweep.svg").read_text()


def test_the_wide_shadow_is_reckoned_for_the_whole_geometry() -> None:
    """128 experts of 3 x 2816 x 704 weights in 30 layers, 4.5 bits each; Q8_0 has 8.5, BF16 16."""
    assert shadow_bytes() == 30 * 128 * 3 * 2816 * 704 * 18 // 32
    assert shadow_shares() == {"Q8_0": pytest.approx(4.5 / 8.5), "BF16": pytest.approx(4.5 / 16)}
    assert bytes_a_token_reads(REAL) > 1.5 * bytes_a_token_reads(WIDE)
    whole, float_rows = (Way("", 1, (), target).link for target in (Format.Q8_0, Format.BF16))
    assert whole == LINK
    assert float_rows.up_mbit == pytest.approx(20 / 3.5, rel=0.01), "4 bytes for 1 and its scale"
