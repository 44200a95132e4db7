"""The verb `top`: a screen that follows nodes, or one look at them."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.errors import NodeError, UsageError

if TYPE_CHECKING:
    from client.top.scrape import Watched

PAPER_WIDTH = 10_000  # nothing is cut in a file or a pipe


def top(
    nodes: Annotated[
        list[str],
        typer.Argument(help="host:port of each node's --metrics-listen", show_default=False),
    ],
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="print a table after one interval, and end")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one object after one interval, and end")
    ] = False,
) -> None:
    """Show what expert nodes are doing: calls, cache hits, stalls, reads, temperature.

    With --once or --json the exit status is 4 if a node does not answer.
    """
    from client.top.scrape import look_at_all, watch

    watched = watch(nodes)
    if not (once or as_json):
        try:
            from client.top.screen import TopApp
        except ImportError:
            raise UsageError(
                "the screen needs Textual, which is not installed: pip install 'shoal[tui]', or "
                "take --once"
            ) from None
        TopApp(watched, interval).run()
        return
    look_at_all(watched)
    time.sleep(interval)
    look_at_all(watched)
    if as_json:
        import orjson

        found = {
            node.name: asdict(node.figures) if node.figures else {"problem": node.problem}
            for node in watched
        }
        typer.echo(orjson.dumps(found).decode())
    else:
        _print_table(watched)
    if silent := [f"{node.name} ({node.problem})" for node in watched if node.figures is None]:
        raise NodeError(f"no answer from {', '.join(silent)}")


def _print_table(watched: "list[Watched]") -> None:
    from rich.console import Console
    from rich.table import Table

    from client.top.columns import COLUMNS, cells_of

    answering = [(node.name, node.figures) for node in watched if node.figures is not None]
    table = Table("", *[name for name, _ in answering])
    columns = [cells_of(figures) for _, figures in answering]
    for title, *cells in zip(COLUMNS, *columns, strict=True):
        table.add_row(title, *cells)
    console = Console()
    if not console.is_terminal:
        console.width = PAPER_WIDTH
    if answering:
        console.print(table)
