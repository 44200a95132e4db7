"""The list of metrics and the page about them say the same."""

import re
from pathlib import Path

from shoal import metrics

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/metrics.md"
ROW = re.compile(r"\| `(shoal_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|")


def test_every_metric_is_documented_as_it_is() -> None:
    rows = {
        match[1]: (match[2], tuple(re.findall(r"`(\w+)`", match[3])), match[4])
        for line in PAGE.read_text().splitlines()
        if (match := ROW.fullmatch(line))
    }
    assert rows == {m.name: (m.kind.value, m.labels, m.help) for m in metrics.ALL}


def test_names_follow_prometheus() -> None:
    for metric in metrics.ALL:
        assert re.fullmatch(r"shoal(_[a-z]+)+", metric.name), metric.name
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_us"))
        assert metric.help[0].islower() or metric.help[0].isdigit(), metric.name
        assert all(re.fullmatch(r"[a-z_]+", label) for label in metric.labels)


def test_what_is_asked_in_examples_exists() -> None:
    text = PAGE.read_text()
    asked = set(re.findall(r"shoal_[a-z_]+[a-z]", text))
    known = {m.name for m in metrics.ALL} | {f"{m.name}_total" for m in metrics.ALL}
    assert asked <= known, asked - known
