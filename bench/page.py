"""What the generators of documentation pages share: tables, blocks, where figures are from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def put(text: str, block: str, body: str) -> str:
    """Return the page with that body in a block."""
    begin, end = f"<!-- {block} -->\n", "<!-- end -->"
    before, found, rest = text.partition(begin)
    assert found, f"the page has no block {block}"
    return f"{before}{begin}{body}\n{end}{rest.partition(end)[2]}"


def link(path: Path) -> str:
    """Return a link from a page of docs/ to a result file."""
    return f"[{path.name}](../bench/results/{path.name})"


def commit(report: Mapping[str, Any]) -> str:
    """Return which code a result is of."""
    changes = " and changes" if report["uncommitted_changes"] else ""
    return f"commit {str(report['commit'])[:8]}{changes}"
