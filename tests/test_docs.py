"""Checks of the documents: what they point at is there, what is generated is what was measured."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.wan import page

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows what is ours")
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"^<!-- ([\w-]+) -->\n(.*?)^<!-- end -->", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def documents() -> list[Path]:
    """Return every Markdown file that git knows."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "*.md"], capture_output=True, check=True
    )
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


def links(document: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, anchor) of each link that leads to a place in this repository."""
    for target in LINK.findall(FENCED.sub("", document.read_text("utf-8"))):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (document.parent / path if path else document), anchor


def anchors(document: Path) -> set[str]:
    """Return the anchors of its headings, as GitHub makes them."""
    plain = (
        re.sub(r"[^\w\- ]", "", text.lower()) for text in HEADING.findall(document.read_text())
    )
    return {text.strip().replace(" ", "-") for text in plain}


def blocks(document: Path) -> dict[str, str]:
    """Return what a page's generators wrote, by block."""
    found = GENERATED.findall(document.read_text("utf-8"))
    return {name: body.strip() for name, body in found}


def test_every_link_between_documents_leads_somewhere() -> None:
    """A picture may be missing while the figures that are drawn there are, too."""
    broken = [
        f"{document.relative_to(ROOT)}: {path.name}{anchor and '#' + anchor}"
        for document in documents()
        for path, anchor in links(document)
        if not path.exists() or (anchor and anchor not in anchors(path))
        if path.suffix != ".svg" or all(blocks(document).values())
    ]
    assert not broken, "\n".join(broken)


def test_a_result_file_that_a_document_links_is_committed() -> None:
    """It would exist here, and be missing for everybody else."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "bench/results"], capture_output=True, check=True
    )
    known = {ROOT / name for name in listed.stdout.decode().splitlines()}
    linked = {path.resolve() for document in documents() for path, _ in links(document)}
    missing = [path.name for path in linked - known if path.parent == ROOT / "bench" / "results"]
    assert not missing, missing


def test_the_page_of_the_home_link_shows_the_newest_figures() -> None:
    text = page.PAGE.read_text("utf-8")
    assert page.filled(text, "wan") == text, "run: python -m bench.wan.page"


def test_a_page_of_generated_blocks_has_all_of_them_or_was_not_measured_yet() -> None:
    pages = {document.name: blocks(document) for document in documents()}
    forgotten = [
        f"{page}: {name}"
        for page, bodies in pages.items()
        for name, body in bodies.items()
        if not body and any(bodies.values())
    ]
    assert not forgotten, f"measure what is missing (the page says how): {forgotten}"
