"""`shoal doctor`: examines machine and installation, and says how to mend what is amiss."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from client import examine, examine_reads
from client.examine import Finding, State

PARTS: dict[str, Callable[[], Iterable[Finding]]] = {
    "Installation": examine.installation,
    "Processor": examine.processor,
    "Kernels": examine.kernels,
    "Memory": examine.memory,
    "Storage": examine.storage,
    "Reads": examine_reads.reading,
    "Network": examine.network,
}
MARKS = {State.FINE: "[green]ok[/]", State.WARNING: "[yellow]!![/]", State.PROBLEM: "[red]no[/]"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="measure how fast this model's experts are read (1 s)"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="measure how fast kernels read memory (2 s, 1 GiB)")
    ] = False,
) -> None:
    """Examine this machine and this installation; say how to mend what is amiss.

    Exit status 0: nothing keeps shoal from working (warnings may cost speed); 1: something does.
    """
    parts = dict(PARTS)
    if bandwidth:
        parts["Bandwidth"] = examine.bandwidth
    if model is not None:
        parts["Model"] = partial(examine_reads.model_reads, model)
    findings = {title: list(look()) for title, look in parts.items()}
    everything = [finding for part in findings.values() for finding in part]
    healthy = all(finding.state is not State.PROBLEM for finding in everything)
    if as_json:
        import orjson

        report = {"ok": healthy, "findings": [asdict(finding) for finding in everything]}
        sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE))
    else:
        _print(findings, everything)
    if not healthy:
        raise typer.Exit(1)


def _print(findings: dict[str, list[Finding]], everything: Sequence[Finding]) -> None:
    from rich.console import Console  # not for --help
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for title, part in findings.items():
        table.add_row(f"[bold]{title}[/]")
        for finding in part:
            table.add_row(f"  {escape(finding.name)}", MARKS[finding.state], escape(finding.value))
    console.print(table)
    bad = [finding for finding in everything if finding.fix is not None]
    if not bad:
        console.print("\n[green]Nothing is amiss.[/]")
    for finding in bad:
        console.print(f"\n{MARKS[finding.state]} [bold]{escape(finding.name)}[/]: {finding.fix}")
