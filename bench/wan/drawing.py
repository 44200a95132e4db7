"""The picture of docs/wan.md as SVG, drawn by hand: no plotting library needed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.measure import Row
from bench.svg import save, text

STYLE = (
    "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}"
    ".a{fill:none;stroke:#777;stroke-width:2}.b{fill:none;stroke:#2f6fb0;stroke-width:2}"
    ".c{fill:none;stroke:#c0392b;stroke-width:2}.a-dot{fill:#777}.b-dot{fill:#2f6fb0}"
    ".c-dot{fill:#c0392b}.line{stroke:#555;stroke-dasharray:5 4}"
)
CLASSES = ("a", "b", "c")
LEFT, TOP, WIDTH, HEIGHT, RIGHT = 50, 30, 460, 300, 190
TITLE = "tokens a second, by round trip; 30 MoE layers on two nodes; in brackets local expert bytes"
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)


def draw_sweep(
    path: Path, rows: Sequence[Row], references: Mapping[str, tuple[float, float]]
) -> None:
    """Draw decoded tokens a second over the round trip, both logarithmic, a line a mode.

    Args: references: what else is marked: name -> (seconds there and back, tokens a second).
    """
    rates = [row["decode_tokens_per_s"] for row in rows] + [y for _, y in references.values()]
    low = max(t for t in (0.125, *TICKS) if t <= min(rates))
    high = min(t for t in (*TICKS, 128) if t >= max(rates))
    rtts = sorted({row["rtt_s"] for row in rows})

    def x(rtt_s: float) -> float:
        return LEFT + WIDTH * math.log(rtt_s / rtts[0]) / math.log(rtts[-1] / rtts[0])

    def y(rate: float) -> float:
        return TOP + HEIGHT * (1 - math.log(rate / low) / math.log(high / low))

    parts: list[str] = []
    for tick in TICKS:
        if low <= tick <= high:
            parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}h{WIDTH}"/>')
            parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    for rtt_s in rtts:
        parts.append(f'<path class="grid" d="M{x(rtt_s):.1f} {TOP}v{HEIGHT}"/>')
        parts.append(text(x(rtt_s), TOP + HEIGHT + 18, f"{rtt_s * 1e3:g} ms", "middle"))
    for style, mode in zip(CLASSES, dict.fromkeys(row["mode"] for row in rows), strict=False):
        mine = [row for row in rows if row["mode"] == mode]
        points = [(x(row["rtt_s"]), y(row["decode_tokens_per_s"])) for row in mine]
        joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="{style}" points="{joined}"/>')
        parts += [
            f'<circle class="{style}-dot" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points
        ]
        label = f"{mode} ({mine[0]['local_expert_bytes'] / 1e6:.0f} MB)"
        parts.append(text(points[-1][0] + 8, points[-1][1] + 4, label, "start"))
    for name, (rtt_s, rate) in references.items():
        px, py = x(rtt_s), y(rate)
        parts.append(f'<path class="line" d="M{px - 5:.1f} {py - 5:.1f}l10 10m0 -10l-10 10"/>')
        parts.append(text(px - 8, py + 4, name, "end"))
    parts.append(text(LEFT, 14, TITLE, "start"))
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + 30
    save(path, STYLE, parts, width, height)
