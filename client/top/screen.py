"""The terminal screen of `shoal top`. Needs [tui]."""

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Header, Label, Sparkline

from client.top.columns import COLUMNS, cells_of
from client.top.scrape import Watched, look_at_all

HISTORY = 120  # looks that the curves show


class TopApp(App[None]):
    """A row a node, and curves of the one under the cursor."""

    CSS = """
    DataTable { height: 1fr; }
    #curves { height: auto; padding: 0 1; border-top: solid $primary; }
    Sparkline { height: 3; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("space", "pause", "Pause"),
    ]
    TITLE = "shoal top"

    def __init__(self, nodes: Sequence[Watched], interval_s: float) -> None:
        super().__init__()
        self._watched = {node.name: node for node in nodes}
        self._interval_s = interval_s
        self._is_paused = False
        self._calls: dict[str, deque[float]] = {
            name: deque(maxlen=HISTORY) for name in self._watched
        }
        self._reads: dict[str, deque[float]] = {
            name: deque(maxlen=HISTORY) for name in self._watched
        }

    def compose(self) -> ComposeResult:
        """Lay the screen out."""
        yield Header(show_clock=True)
        yield DataTable(cursor_type="row", zebra_stripes=True)
        with Vertical(id="curves"):
            yield Label("", id="whose")
            yield Sparkline([], id="calls")
            yield Label("read MB/s")
            yield Sparkline([], id="reads")
        yield Footer()

    def on_mount(self) -> None:
        """Make the rows and begin to look."""
        table = self.query_one(DataTable)
        for column in ("node", *COLUMNS):
            table.add_column(column, key=column)
        for name in self._watched:
            table.add_row(name, *[""] * len(COLUMNS), key=name)
        self.sub_title = f"{len(self._watched)} nodes, every {self._interval_s:g} s"
        self.set_interval(self._interval_s, self._look)
        self._look()

    def action_pause(self) -> None:
        """Stop looking, or go on."""
        self._is_paused = not self._is_paused
        self.sub_title = "paused" if self._is_paused else f"every {self._interval_s:g} s"

    def on_data_table_row_highlighted(self) -> None:
        """Show the curves of the node under the cursor."""
        self._show_curves()

    @work(thread=True, exclusive=True)
    def _look(self) -> None:
        if self._is_paused:
            return
        look_at_all(list(self._watched.values()))
        self.call_from_thread(self._show)

    def _show(self) -> None:
        table = self.query_one(DataTable)
        for name, node in self._watched.items():
            figures = node.figures
            if figures is None:
                cells = [f"no answer: {node.problem}", *["-"] * (len(COLUMNS) - 1)]
            else:
                cells = cells_of(figures)
                self._calls[name].append(figures.calls_per_s or 0.0)
                self._reads[name].append((figures.read_bytes_per_s or 0.0) / 1e6)
            for column, text in zip(COLUMNS, cells, strict=True):
                table.update_cell(name, column, text, update_width=True)
        self._show_curves()

    def _show_curves(self) -> None:
        table = self.query_one(DataTable)
        if not table.is_valid_row_index(table.cursor_row):
            return
        name = str(table.get_row_at(table.cursor_row)[0])
        figures = self._watched[name].figures
        who = "" if figures is None else f" ({figures.model}, {figures.isa})"
        self.query_one("#whose", Label).update(f"{name}{who}: calls/s")
        self.query_one("#calls", Sparkline).data = list(self._calls[name])
        self.query_one("#reads", Sparkline).data = list(self._reads[name])
