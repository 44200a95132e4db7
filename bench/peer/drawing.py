"""The pictures of docs/speed.md as SVG, drawn by hand: no plotting library needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.svg import save, text

COLOURS = ("#2f6fb0", "#c0392b", "#e08e2b", "#777")
LABEL_ROOM = 34.0  # px that a number below a panel may take
FONT = "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}"
GAP, HEAD, FOOT = 50, 46, 30


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one series; without dots it is a model of them, drawn dashed."""

    name: str
    points: Sequence[tuple[float, float]]
    has_dots: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes; x is logarithmic where `logarithmic`, y begins at 0."""

    title: str
    x_label: str
    lines: Sequence[Line]
    logarithmic: bool = False


def draw_panels(path: Path, panels: Sequence[Panel], width: int = 330, height: int = 200) -> None:
    """Draw panels two a row."""
    parts: list[str] = []
    for index, panel in enumerate(panels):
        left = GAP + index % 2 * (width + GAP)
        top = HEAD + index // 2 * (height + HEAD + FOOT)
        parts += _panel(panel, left, top, width, height)
    rows = -(-len(panels) // 2)
    save(path, FONT, parts, 2 * (width + GAP) + 20, rows * (height + HEAD + FOOT) + 10)


def _panel(panel: Panel, left: float, top: float, width: float, height: float) -> list[str]:
    xs = sorted({x for line in panel.lines for x, _ in line.points})
    tick = _nice(max(y for line in panel.lines for _, y in line.points) / 4)
    highest = tick * math.ceil(max(y for line in panel.lines for _, y in line.points) / tick)

    def along(x: float) -> float:
        if panel.logarithmic:
            return left + width * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        return left + width * (x - xs[0]) / (xs[-1] - xs[0])

    def up(y: float) -> float:
        return top + height * (1 - y / highest)

    parts = [text(left, top - 26, panel.title, "start")]
    for step in range(round(highest / tick) + 1):
        parts.append(f'<path class="grid" d="M{left} {up(step * tick):.1f}h{width}"/>')
        parts.append(text(left - 6, up(step * tick) + 4, f"{step * tick:g}", "end"))
    free = left - LABEL_ROOM
    for x in xs:
        if along(x) >= free + LABEL_ROOM:  # else it would lie on the one before
            free = along(x)
            parts.append(text(free, top + height + 16, f"{x:g}", "middle"))
    parts.append(text(left + width, top + height + 30, panel.x_label, "end"))
    name_at = left
    for colour, line in zip(COLOURS, panel.lines, strict=False):
        joined = " ".join(f"{along(x):.1f},{up(y):.1f}" for x, y in sorted(line.points))
        dashes = "" if line.has_dots else ' stroke-dasharray="5 4"'
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dashes} points="{joined}"/>'
        )
        if line.has_dots:
            parts += [
                f'<circle fill="{colour}" cx="{along(x):.1f}" cy="{up(y):.1f}" r="3"/>'
                for x, y in line.points
            ]
        parts.append(
            f'<path stroke="{colour}" stroke-width="2"{dashes} d="M{name_at} {top - 12}h18"/>'
        )
        parts.append(text(name_at + 23, top - 8, line.name, "start"))
        name_at += 40 + 7 * len(line.name)
    return parts


def draw_bars(
    path: Path, title: str, bars: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]
) -> None:
    """Draw a group of bars a row, each beside its number, on a scale of its own row."""
    left, bar, width = 190, 13, 420
    parts = [text(10, 18, title, "start")]
    at = 10
    for colour, name in zip(COLOURS, names, strict=False):
        parts.append(f'<rect fill="{colour}" x="{at}" y="28" width="10" height="10"/>')
        parts.append(text(at + 15, 37, name, "start"))
        at += 40 + 7 * len(name)
    top = 52
    for name, values in bars:
        parts.append(text(left - 8, top + bar * len(values) / 2 + 4, name, "end"))
        for colour, value in zip(COLOURS, values, strict=False):
            length = width * value / max(values)
            parts.append(
                f'<rect fill="{colour}" x="{left}" y="{top}" width="{length:.1f}" '
                f'height="{bar - 2}"/>'
            )
            parts.append(text(left + length + 5, top + bar - 3, f"{value:.1f}", "start"))
            top += bar
        top += 9
    save(path, FONT, parts, left + width + 70, top)


def _nice(step: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= step)
