"""StopStrings: what is passed on does not depend on where the pieces were cut."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.stop_strings import StopStrings


def _run(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    strings = StopStrings(stop)
    told = "".join(strings.push(piece) for piece in pieces)
    return told + strings.finish(), strings.is_stopped


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=1),
    st.data(),
)
def test_any_cutting_of_a_text_gives_the_text_before_the_stop_string(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    position = text.find(stop[0])
    expected = (text, False) if position < 0 else (text[:position], True)
    assert _run(pieces, stop) == expected


def test_no_more_is_held_back_than_may_begin_a_stop_string() -> None:
    strings = StopStrings(["<end>", "##"])
    assert strings.push("one <") == "one "
    assert strings.push("b> #") == "<b> "
    assert strings.push(" x") == "# x"
    assert strings.push("<en") == "" and strings.push("d> y") == "" and strings.is_stopped
    assert strings.push("more") == "" and strings.finish() == ""


def test_of_two_stop_strings_the_one_that_begins_first_ends_the_text() -> None:
    assert _run(["a stop here"], ["here", "stop"]) == ("a ", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("anything") == "anything"
