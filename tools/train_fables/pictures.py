"""The two pictures of docs/fables.md as SVG, drawn by hand: no plotting library needed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STYLE = (
    "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.train{fill:none;stroke:#9ab8d8}"
    ".valid{fill:none;stroke:#c0392b;stroke-width:2}.line{stroke:#555;stroke-dasharray:5 4}"
)
_SHADES = 16


def write_curves(path: Path, log: Sequence[Mapping[str, Any]], levels: Mapping[str, float]) -> None:
    """Draw training and validation loss (nats per token, left; perplexity, right) over tokens."""
    left, top, width, height = 60, 20, 620, 300
    millions = max(entry["tokens"] for entry in log) / 1e6
    low, high = 0.2, 8.0

    def x(tokens: float) -> float:
        return left + width * tokens / 1e6 / millions

    def y(nats: float) -> float:
        share = math.log(max(min(nats, high), low) / low) / math.log(high / low)
        return top + height * (1 - share)

    parts: list[str] = []
    for nats in (0.25, 0.5, 1, 2, 4, 8):
        parts.append(f'<path class="grid" d="M{left} {y(nats):.1f}h{width}"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y(nats) + 4:.1f}" text-anchor="end">{nats:g}</text>'
        )
        label = f"{math.exp(nats):.3g}"
        parts.append(f'<text x="{left + width + 8}" y="{y(nats) + 4:.1f}">{label}</text>')
    for tick in range(0, int(millions) + 1):
        parts.append(
            f'<text x="{x(tick * 1e6):.1f}" y="{top + height + 18}" text-anchor="middle">{tick}</text>'
        )
    for name, caption in (("five_gram", "5-gram"), ("bound", "the grammar's own entropy, at most")):
        level = y(levels[name])
        parts.append(f'<path class="line" d="M{left} {level:.1f}h{width}"/>')
        parts.append(
            f'<text x="{left + width - 4}" y="{level - 4:.1f}" text-anchor="end">{caption}</text>'
        )
    for kind, key in (("train", "loss"), ("valid", "valid")):
        points = [f"{x(e['tokens']):.1f},{y(e[key]):.1f}" for e in log if key in e]
        parts.append(f'<polyline class="{kind}" points="{" ".join(points)}"/>')
    parts.append(f'<text x="{left}" y="14">nats per token (red: validation), million tokens</text>')
    parts.append(f'<text x="{left + width + 48}" y="14" text-anchor="end">perplexity</text>')
    _write(path, left + width + 60, top + height + 30, parts)


def write_heat_map(path: Path, domains: Sequence[str], shares: NDArray[np.float64]) -> None:
    """Draw shares [layers, domains, experts] (1: as by chance), log scale 1/4 white to 4 dark."""
    layers, rows, experts = shares.shape
    cell, left, top, gap = 18, 70, 34, 26
    squares: dict[int, list[str]] = {}
    parts = [
        '<text x="70" y="14">share of an expert in a domain: white a quarter of chance, dark four times</text>'
    ]
    for layer in range(layers):
        y0 = top + layer * (rows * cell + gap)
        parts.append(f'<text x="{left}" y="{y0 - 4}">layer {layer}</text>')
        for row, domain in enumerate(domains):
            y = y0 + row * cell
            parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{domain}</text>')
            for expert in range(experts):
                share = max(float(shares[layer, row, expert]), 1e-9)
                place = (math.log2(share) + 2) / 4 * (_SHADES - 1)
                shade = round(min(max(place, 0), _SHADES - 1))
                move = f"M{left + expert * cell} {y}h{cell - 1}v{cell - 1}h-{cell - 1}z"
                squares.setdefault(shade, []).append(move)
    for shade, moves in sorted(squares.items()):
        value = shade / (_SHADES - 1)
        red, green, blue = (round(255 - value * (255 - end)) for end in (8, 48, 107))
        parts.append(f'<path fill="rgb({red},{green},{blue})" d="{"".join(moves)}"/>')
    _write(path, left + experts * cell + 20, top + layers * (rows * cell + gap), parts)


def _write(path: Path, width: int, height: int, parts: Sequence[str]) -> None:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    )
    background = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    body = "\n".join(parts)
    path.write_text(f"{head}<style>{_STYLE}</style>{background}\n{body}\n</svg>\n")
