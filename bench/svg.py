"""SVG drawn by hand: no plotting library needed."""

from collections.abc import Sequence
from pathlib import Path


def text(x: float, y: float, words: str, anchor: str) -> str:
    """Return words at a place; anchor: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def save(path: Path, style: str, parts: Sequence[str], width: float, height: float) -> None:
    """Write a picture on white."""
    box = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}><style>{style}</style>'
    background = f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>'
    body = "\n".join(parts)
    path.write_text(f"{head}{background}\n{body}\n</svg>\n")
