"""Draws how similar vectors are, as two heat-maps: their cosines, and the same with the common part taken out.

Both have the rows of the clustered cosines, so that what moves is the colour. TPV_URL says where the registry is.

    python examples/plot_similarity.py similarity.svg lab/movie-tense-plus-0 lab/hotel-tense-plus-0 ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import tpv

CELL, GAP, MARGIN = 34, 30, 12  #: pixels
LETTER = 6.2  #: pixels, about the mean width of a letter that is 11 high
NEGATIVE, ZERO, POSITIVE = (178, 24, 43), (247, 247, 247), (33, 102, 172)


def main(target: Path, references: list[str]) -> None:
    with tpv.Client() as client:
        plain = client.similarity.matrix(references, metric="cosine")
        centered = client.similarity.matrix(references, metric="cosine-centered")
    order = plain.order
    names = [plain.references[i].rpartition("/")[2].rpartition(":")[0] for i in order]
    maps = [
        (title, [[answer.matrix[i][j] for j in order] for i in order])
        for title, answer in (("cosine", plain), ("cosine-centered", centered))
    ]
    target.write_text(drawing(names, maps), encoding="utf-8")


def drawing(names: Sequence[str], maps: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> str:
    """An SVG with one square map of values from -1 to 1 beside the other; the names stand left of the first."""
    room = MARGIN + LETTER * max(map(len, names)) + 6
    side, top = CELL * len(names), 40
    width, height = room + len(maps) * side + (len(maps) - 1) * GAP + MARGIN, top + side + room
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for row, name in enumerate(names):
        y = top + CELL * (row + 0.5)
        parts.append(f'<text x="{room - 6:.0f}" y="{y:.0f}" dy="4" text-anchor="end">{escape(name)}</text>')
    for index, (title, values) in enumerate(maps):
        left = room + index * (side + GAP)
        parts.append(f'<text x="{left:.0f}" y="26" font-size="14" font-weight="bold">{escape(title)}</text>')
        parts.append(f'<g transform="translate({left:.0f} {top})" text-anchor="middle">')
        for i, row_values in enumerate(values):
            for j, value in enumerate(row_values):
                x, y = CELL * j, CELL * i
                ink = ' fill="#fff"' if abs(value) > 0.6 else ""
                parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{colour(value)}"/>')
                parts.append(f'<text x="{x + CELL // 2}" y="{y + CELL // 2}" dy="4"{ink}>{value:z.2f}</text>')
        parts.append("</g>")
        for column, name in enumerate(names):
            place = f"translate({left + CELL * (column + 0.5):.0f} {top + side + 6}) rotate(-90)"
            parts.append(f'<text transform="{place}" dy="4" text-anchor="end">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def colour(value: float) -> str:
    """From red at -1 over nearly white at 0 to blue at 1."""
    end = POSITIVE if value > 0 else NEGATIVE
    share = min(1.0, abs(value))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(ZERO, end, strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
