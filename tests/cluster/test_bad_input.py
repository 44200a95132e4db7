"""Bad input at the command line: the exit status, and what the user reads.

Held elsewhere, at the same level: wrong and gapped maps, nodes that are down, die or hang in the
middle of a run (test_run_with_nodes.py); ports and sockets in use, flags of a node
(test_node_process.py); flags of `shoal up` (test_up.py); flags of `shoal run`
(unit/test_run_and_chat.py); a closed pipe (unit/test_cli.py). A convert that is killed in the
middle of a file, and a disk that is full (ENOSPC): unit/test_writer.py.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from client.cli import main
from client.node_process import NodeProcess
from shoal import limits, ops
from support.checkpoints import tiny_config, write_checkpoint
from support.cluster import Cluster
from support.command import Ended, assert_refused, end_of, running_shoal, shoal, shoal_here
from support.expert_node import NodeDied, start_node
from support.tiny_gguf import write_gguf
from support.tiny_model import make_tiny_artifact

IDS = ("--prompt-ids", "5,6,7", "--ignore-eos", "--max-tokens", "4")
Here = Callable[..., Ended]
ENDLESS = ("--prompt-ids", "5,6,7", "--ignore-eos", "--max-tokens", "90000")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_artifact(
        tmp_path_factory.mktemp("model"), "qwen3_moe", "q8_0", max_position_embeddings=100_000
    )


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    """The artifact again, to be damaged."""
    return Path(shutil.copytree(path, tmp_path / "copy.shoal"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint", tiny_config("qwen3_moe"), 2)
    return tmp_path / "checkpoint"


@pytest.fixture
def node(path: Path) -> Iterator[NodeProcess]:
    with Cluster() as cluster:
        yield cluster.node(path)


@pytest.fixture
def here(capfdbinary: pytest.CaptureFixture[bytes]) -> Here:
    """`shoal` in this process, where a process of its own would add nothing."""
    return partial(shoal_here, capfdbinary)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- nodes ----------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_node_of_another_model_ends_the_run_before_the_first_token(
    path: Path, tmp_path: Path, here: Here
) -> None:
    other = make_tiny_artifact(tmp_path, "qwen3_moe", "q8_0", seed=1, name="other")
    with Cluster() as cluster:
        node = cluster.node(other)
        ended = here("run", path, *IDS, "--moe-shards", f"0-15={node.endpoint}")
    assert_refused(ended, 4, node.endpoint, "serves another model: 'other'", "'tiny'")
    assert ended.out == b""


@pytest.mark.processes
def test_a_node_outlives_the_coordinators_that_are_killed(path: Path, node: NodeProcess) -> None:
    shards = ("--moe-shards", f"0-15={node.endpoint}")
    expected = shoal("run", path, *IDS, *shards)
    assert expected.status == 0
    with running_shoal("run", path, *ENDLESS, *shards) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.kill()
    again = shoal("run", path, *IDS, *shards)
    assert (again.status, again.out) == (0, expected.out)


# --- damage ---------------------------------------------------------------------------------------

EXPERTS = "experts/layer-001.safetensors"
EVERY_FILE = ("manifest.json", "dense.safetensors", EXPERTS, "tokenizer.json")


def start_refused(model: Path, log: Path) -> str:
    """Start a node that must refuse the artifact; return its stderr."""
    with pytest.raises(NodeDied) as caught:
        start_node(model, log, "--warmup")
    assert caught.value.status == 3
    return caught.value.stderr


@pytest.mark.processes
@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_file_cut_short_is_refused_by_verify_run_and_node(
    copy: Path, tmp_path: Path, name: str, here: Here
) -> None:
    os.truncate(copy / name, (copy / name).stat().st_size - 7)
    for arguments in (("verify", copy), ("run", copy, *IDS)):
        assert_refused(here(*arguments), 3, str(copy / name), "convert the model again")
    assert name in start_refused(copy, tmp_path / "log")


@pytest.mark.processes
@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_flipped_bit_is_refused_by_verify_run_and_every_node_that_reads_it(
    copy: Path, tmp_path: Path, name: str, here: Here
) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-100] ^= 4
    (copy / name).write_bytes(data)
    for arguments in (("verify", copy), ("run", copy, *IDS)):
        assert_refused(here(*arguments), 3, str(copy / name), "convert the model again")
    if name in ("manifest.json", EXPERTS):  # a node reads nothing else
        assert name in start_refused(copy, tmp_path / "log")


# --- convert --------------------------------------------------------------------------------------


def overwrite(folder: Path, tensor: str, value: float) -> None:
    """Replace an element of a tensor of model.safetensors."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = 8 + size + json.loads(data[8 : 8 + size])[tensor]["data_offsets"][0]
    data[begin : begin + 4] = np.float32(value).tobytes()
    path.write_bytes(data)


def test_a_gguf_type_or_architecture_that_is_not_ours_is_refused_by_name(
    tmp_path: Path, here: Here
) -> None:
    config = tiny_config("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    write_checkpoint(tmp_path / "c", config, 4)
    kind = GGMLQuantizationType.Q6_K
    columns, size = GGML_QUANT_SIZES[kind]
    raw = {"blk.0.ffn_down.weight": (kind, bytes(256 * 512 // columns * size))}
    write_gguf(tmp_path / "type.gguf", tmp_path / "c", config, raw=raw)
    write_gguf(tmp_path / "arch.gguf", tmp_path / "c", config, architecture="mamba")
    (tmp_path / "models").mkdir()
    out = tmp_path / "models" / "m"
    ended = here("convert", tmp_path / "type.gguf", out)
    assert_refused(ended, 3, "blk.0.ffn_down.weight", "Q6_K", "--quant")
    ended = here("convert", tmp_path / "arch.gguf", out)
    assert_refused(ended, 3, "'mamba' is not supported", "qwen3moe")
    assert names(tmp_path / "models") == []


def test_a_weight_that_is_not_a_number_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, here: Here
) -> None:
    tensor = "model.layers.1.mlp.experts.3.up_proj.weight"
    overwrite(checkpoint, tensor, np.nan)
    ended = here("convert", checkpoint, tmp_path / "m", "--quant", "q8_0")
    assert_refused(ended, 3, tensor, "NaN")
    assert names(tmp_path) == ["checkpoint"]


def test_a_value_that_overflows_while_it_is_computed_is_refused(
    checkpoint: Path, tmp_path: Path, here: Here
) -> None:
    overwrite(checkpoint, "model.layers.1.post_attention_layernorm.weight", 3e38)
    assert here("convert", checkpoint, tmp_path / "m").status == 0
    ended = here("run", tmp_path / "m", *IDS)
    assert_refused(ended, 5, "layer 1")
    assert ended.out.strip() == b""


@pytest.mark.processes
def test_a_disk_that_fills_up_during_convert_or_slice_leaves_nothing(
    checkpoint: Path, path: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the disk; unit/test_writer.py has the real errno."""
    full = 'ulimit -f 64; exec "$@"'
    part = ("--preset", "expert-node", "--experts", "0-7")
    for verb, source, more in (("convert", checkpoint, ()), ("slice", path, part)):
        ended = shoal(verb, source, tmp_path / "m", *more, shell=full)
        assert_refused(ended, 3, f"cannot write {tmp_path / 'm.shoal'}", "nothing was left behind")
        assert names(tmp_path) == ["checkpoint"]


def test_what_a_killed_convert_left_is_no_model_and_the_next_one_removes_it(
    checkpoint: Path, tmp_path: Path, here: Here
) -> None:
    left = tmp_path / ".m.shoal.partial-1"
    left.mkdir()
    (left / "lock").touch()
    (left / "dense.safetensors").write_bytes(b"half of it")
    assert_refused(here("run", tmp_path / "m", *IDS), 2, "no model")
    assert_refused(here("run", left, *IDS), 3, "is not an artifact")
    ended = here("convert", checkpoint, tmp_path / "m", "--quant", "q8_0")
    assert ended.status == 0
    assert f"removed what a killed run had left: {left}" in ended.err
    assert names(tmp_path) == ["checkpoint", "m.shoal"]


@pytest.mark.processes
def test_a_home_that_cannot_be_written_is_named(checkpoint: Path) -> None:
    ended = shoal("convert", checkpoint, "m", env={"SHOAL_HOME": "/dev/null/shoal"})
    assert_refused(ended, 3, "cannot write /dev/null/shoal/models/m.shoal")


@pytest.mark.processes
def test_any_file_name_can_be_converted(checkpoint: Path, tmp_path: Path) -> None:
    odd = checkpoint.rename(tmp_path / "a\nb\udcff")  # \xff, which is no UTF-8
    assert shoal("convert", odd, tmp_path / "m", "--quant", "q8_0").status == 0
    ended = shoal("inspect", tmp_path / "m", "--json")
    assert json.loads(ended.out)["source"] == "a?b?"


# --- requests -------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(
    path: Path, here: Here
) -> None:
    ended = here("run", path, "word " * 50, "--max-context", "20")
    assert_refused(ended, 2, "the context holds 20", "shorten the prompt")
    assert ended.out == b""


REFUSED: dict[str, tuple[tuple[object, ...], int, str]] = {
    "empty prompt": (("run", "M", ""), 2, "the prompt is empty"),
    "no tokens": (("run", "M", "hi", "--max-tokens", "0"), 2, "must be at least 1"),
    "fewer than no tokens": (("run", "M", "hi", "--max-tokens", "-1"), 2, "must be at least 1"),
    "no number": (("run", "M", *IDS, "--temperature", "nan"), 2, "temperature = nan"),
    "tiny temperature": (("run", "M", *IDS, "--temperature", "1e-30"), 2, "0.001..1000"),
    "endless temperature": (("run", "M", *IDS, "--temperature", "inf"), 2, "temperature = inf"),
    "ids with a hole": (("run", "M", "--prompt-ids", "1,,2"), 2, "'' at place 1"),
    "negative id": (("run", "M", "--prompt-ids=-1"), 2, "'-1' at place 0"),
    "text that is no Unicode": (("run", "M", "a\udcff"), 2, "not valid Unicode at character 1"),
    "more threads than there can be": (
        ("run", "M", *IDS, "--threads", limits.MAX_THREADS + 1),
        2,
        f"must be in 1..{limits.MAX_THREADS}",
    ),
    "misspelt model": (("run", "tinny", "hi"), 2, "no model 'tinny'"),
    "no name": (("run", "", "hi"), 2, "name is empty"),
    "nobody's home": (("run", "~no-such-user/m", "hi"), 2, "no such user"),
    "socket path": (("node", "M", "--listen", f"unix:///{'x' * 200}"), 2, "at most 103 bytes"),
    "coordinator slice alone": (("run", "FRONT", *IDS), 2, "--moe-shards"),
    "coordinator slice with local experts": (
        ("run", "FRONT", *IDS, "--moe-shards", "0-15=local"),
        2,
        "is a slice without experts 0-15",
    ),
    "node slice as a coordinator": (("run", "PART", *IDS), 3, "this slice holds experts only"),
    "nodes of a slice": (("up", "PART"), 2, "needs the whole artifact"),
    "node on a coordinator slice": (("node", "FRONT"), 2, "holds no experts"),
    "more than the slice has": (("node", "PART", "--experts", "0-9"), 2, "does not hold expert"),
    "slice of a slice": (
        ("slice", "PART", "OUT", "--preset", "expert-node", "--experts", "6-9"),
        2,
        "is a slice without experts 8-9",
    ),
    "convert over a model": (("convert", "CHECKPOINT", "M"), 2, "--force"),
    "convert over a folder": (("convert", "CHECKPOINT", "FOLDER", "--force"), 2, "artifacts only"),
    "convert a model": (("convert", "M", "OUT"), 3, "not a Hugging Face model folder"),
}


@pytest.fixture(scope="module")
def places(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the capital letters of REFUSED stand for."""
    folder = tmp_path_factory.mktemp("places")
    found = {name: str(folder / f"{name.lower()}.shoal") for name in ("FRONT", "PART", "OUT")}
    found |= {"M": str(path), "CHECKPOINT": str(path.parent / "tiny-checkpoint")}
    found["FOLDER"] = str(folder / "photos.shoal")
    Path(found["FOLDER"]).mkdir()
    (Path(found["FOLDER"]) / "cat.jpg").touch()
    assert main(["slice", found["M"], found["FRONT"], "--preset", "coordinator"]) == 0
    part = ["--preset", "expert-node", "--experts", "0-7"]
    assert main(["slice", found["M"], found["PART"], *part]) == 0
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    places: dict[str, str],
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    arguments, status, words = REFUSED[name]
    before = names(Path(places["M"]).parent)
    assert main([places.get(str(word), str(word)) for word in arguments]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.startswith("error: ")
    assert names(Path(places["M"]).parent) == before
    assert not Path(places["OUT"]).exists()


def test_a_model_without_tokenizer_takes_ids_and_says_so_for_text(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(places["CHECKPOINT"], tmp_path / "c"))
    (source / "tokenizer.json").unlink()
    model = str(tmp_path / "m.shoal")
    assert main(["convert", str(source), model, "--quant", "q8_0"]) == 3
    assert "--no-tokenizer" in capsys.readouterr().err
    assert main(["convert", str(source), model, "--quant", "q8_0", "--no-tokenizer"]) == 0
    reports: list[dict[str, Any]] = []
    for name in (model, places["M"]):
        capsys.readouterr()
        assert main(["run", name, *IDS, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["token_ids"] == reports[1]["token_ids"]
    assert reports[0]["text"] == ""
    for arguments in ((*IDS,), ("text",), ("text", "--chat", "--json")):
        assert main(["run", model, *arguments]) == 2
        assert "has no tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_is_none_is_refused_by_convert(checkpoint: Path, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"vocab": {}}'):
        (checkpoint / "tokenizer.json").write_text(text)
        assert main(["convert", str(checkpoint), str(tmp_path / "m")]) == 3
        assert names(tmp_path) == ["checkpoint"]


# --- the process's surroundings -------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("isa", ["nonsense", "avx512"])
def test_an_instruction_set_that_is_not_here_is_refused(
    path: Path, tmp_path: Path, isa: str
) -> None:
    if isa in ops.available_isas():
        pytest.skip(f"this CPU has {isa}")
    env = {"SHOAL_ISA": isa}
    assert_refused(shoal("run", path, *IDS, env=env), 2, f"SHOAL_ISA: instruction set '{isa}'")
    assert shoal("run", "--help", env=env).status == 0
    with pytest.raises(NodeDied, match=isa) as caught:
        start_node(path, tmp_path / "log", env=env)
    assert caught.value.status == 2


@pytest.mark.processes
def test_a_closed_standard_stream_is_an_empty_one(path: Path) -> None:
    assert_refused(shoal("run", path, "-", shell='exec "$@" <&-'), 2, "the prompt is empty")
    assert shoal("chat", path, shell='exec "$@" <&-').status == 0
    assert shoal("run", path, *IDS, shell='exec "$@" >&-').status == 0
    ended = shoal("run", path, *IDS, shell='exec "$@" 2>&-')
    assert ended.status == 0 and ended.out


@pytest.mark.processes
def test_an_encoding_that_lacks_a_character_gets_an_escape(path: Path) -> None:
    """The ids 128..255 of the tiny vocabulary are bytes beyond ASCII: the text has some U+FFFD."""
    ids = ("--prompt-ids", "5,6,7", "--ignore-eos", "--max-tokens", "40")
    plain = shoal("run", path, *ids)
    narrow = shoal("run", path, *ids, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert plain.status == narrow.status == 0
    assert not plain.out.isascii() and narrow.out.isascii()
    assert narrow.out == plain.out.decode().encode("ascii", "backslashreplace")
    report = shoal("run", path, *ids, "--json", env={"PYTHONIOENCODING": "ascii"})
    assert json.loads(report.out)["text"] + "\n" == plain.out.decode()


@pytest.mark.processes
def test_a_reader_that_leaves_ends_the_run(path: Path) -> None:
    with running_shoal("run", path, *ENDLESS) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.processes
def test_ctrl_c_ends_an_answer_in_order_and_its_node_serves_on(
    path: Path, node: NodeProcess
) -> None:
    shards = ("--moe-shards", f"0-15={node.endpoint}")
    with running_shoal("run", path, *ENDLESS, *shards) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        ended = end_of(process)
    assert ended.status == 130
    assert ended.err.endswith("| cancelled")
    assert shoal("run", path, *IDS, *shards).status == 0


@pytest.mark.processes
def test_ctrl_c_in_a_chat_ends_the_answer_and_not_the_chat(path: Path) -> None:
    with running_shoal("chat", path, "--max-tokens", "90000") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/frobnicate\n")
        ended = end_of(process)
    assert_refused(ended, 2, "| cancelled", "/frobnicate is not a command")
