"""The history on disk survives whatever happens to its file, and never costs a request."""

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.speculation.history import History
from shoal import limits
from shoal.paths import history_dir

TOKENIZER = blake3(b"a tokenizer").hexdigest()
OTHER = blake3(b"another").hexdigest()


class Told(list[str]):
    def __call__(self, sentence: str) -> None:
        self.append(sentence)


def history(
    folder: Path, told: Callable[[str], None] = print, tokenizer: str = TOKENIZER
) -> History:
    return History(folder, tokenizer, told)


def test_texts_come_back_in_order(tmp_path: Path) -> None:
    told = Told()
    first = history(tmp_path, told)
    assert first.texts == ()
    first.add([1, 2, 3])
    first.add([2**32 - 1])
    first.add([])
    first.close()
    assert history(tmp_path, told).texts == ((1, 2, 3), (2**32 - 1,))
    assert told == []


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "history"
    made = history(folder)
    assert not folder.exists(), "a history nobody wrote to leaves nothing"
    made.add([1])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_every_tokenizer_has_its_own(tmp_path: Path) -> None:
    history(tmp_path).add([1])
    assert history(tmp_path, tokenizer=OTHER).texts == ()
    history(tmp_path, tokenizer=OTHER).add([2])
    assert history(tmp_path).texts == ((1,),)


def test_it_is_bounded_and_the_oldest_texts_go(tmp_path: Path) -> None:
    kept = history(tmp_path)
    size = limits.MAX_HISTORY_TOKENS // 4
    for number in range(6):
        kept.add([number] * size)
    texts = history(tmp_path).texts
    assert texts == kept.texts
    assert [text[0] for text in texts] == [3, 4, 5]
    assert kept.path.stat().st_size < 4 * limits.MAX_HISTORY_TOKENS + 200
    kept.add([9] * (2 * limits.MAX_HISTORY_TOKENS))
    assert [len(text) for text in history(tmp_path).texts] == [limits.MAX_HISTORY_TOKENS - 1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_set_aside_and_told_of(tmp_path: Path, data: st.DataObject) -> None:
    written = history(tmp_path)
    written.path.unlink(missing_ok=True)
    written = history(tmp_path)
    written.add([1, 2, 3])
    whole = written.path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from(
            [
                whole[:place],
                whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
                whole + b"x",
                bytes(place),
            ]
        )
    )
    written.path.write_bytes(damaged)
    told = Told()
    again = history(tmp_path, told)
    assert again.texts == ()
    assert len(told) == 1 and "damaged" in told[0] and ".damaged" in told[0]
    assert written.path.with_suffix(".damaged").read_bytes() == damaged
    again.add([7])
    assert history(tmp_path, told).texts == ((7,),)


def test_a_file_of_another_tokenizer_under_this_name_is_none_of_ours(tmp_path: Path) -> None:
    other = history(tmp_path, tokenizer=OTHER)
    other.add([1])
    told = Told()
    other.path.rename(history(tmp_path).path)
    assert history(tmp_path, told).texts == ()
    assert "another tokenizer" in told[0]


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = history(tmp_path).path
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole
    told = Told()
    assert history(tmp_path, told).texts == ()
    assert "more than" in told[0]


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        mine = history(tmp_path)
        for count in range(10):
            mine.add([number, count])
        mine.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = history(tmp_path).texts
    assert sorted(texts) == [(number, count) for number in range(4) for count in range(10)]


def test_while_another_process_writes_a_text_waits_for_the_next(tmp_path: Path) -> None:
    """1. Somebody holds the lock. 2. A text is added: no waiting. 3. They let go. 4. Closed."""
    told = Told()
    mine = history(tmp_path, told)
    lock = os.open(mine.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    mine.add([1])
    assert mine.texts == ((1,),) and not mine.path.exists()
    os.close(lock)
    mine.close()
    assert history(tmp_path).texts == ((1,),)
    assert told == []


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    mine = history(tmp_path)
    mine.add([1])
    partial = mine.path.with_suffix(".partial")
    partial.write_bytes(b"half a fi")
    mine.add([2])
    assert not partial.exists()
    assert history(tmp_path).texts == ((1,), (2,))


def test_a_folder_that_cannot_be_made_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    told = Told()
    mine = history(tmp_path / "file" / "history", told)
    mine.add([1])
    mine.add([2])
    mine.close()
    assert len(told) == 1 and "answers are the same" in told[0]
    assert mine.texts == ((1,), (2,)), "this process still looks them up"


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    mine = history(tmp_path)
    mine.add([1])
    blocked = mine.path.with_suffix(".partial")
    blocked.mkdir()  # what stands in the way of writing stands in for a full disk
    told = Told()
    full = history(tmp_path, told)
    full.add([2])
    assert len(told) == 1 and "cannot be written" in told[0]
    assert history(tmp_path).texts == ((1,),)
    blocked.rmdir()
    full.add([3])
    assert history(tmp_path).texts == ((1,), (2,), (3,))


def test_it_lives_in_the_home_of_shoal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    assert history_dir() == tmp_path / "history"
