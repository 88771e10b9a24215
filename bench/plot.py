"""Pictures of how saslquota grows: SVG files, made of the medians of the rounds."""

from __future__ import annotations

import dataclasses
import html
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import table
from servers import Result

WIDTH, HEIGHT = 420, 260  # of one panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 36, 40, 44  # its margins
COLOURS = ("#1f77b4", "#d95f02", "#555555")

Rounds = Sequence[dict[table.Key, Result]]
Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A file of two panels, rate and p99. A series is named, and has a row for each x."""

    name: str
    axis: str
    series: dict[str, dict[float, table.Key]]


def pictures() -> list[Picture]:
    """What is drawn, as far as it was measured."""
    loads = {float(load): load for load in ("1", "16", "64", "256")}
    rows = {"MariaDB": table.MARIADB, "SQLite": table.SQLITE, "ceiling": table.CEILING}
    return [
        Picture(
            "connections",
            "connections",
            {name: {x: (row, load) for x, load in loads.items()} for name, row in rows.items()},
        ),
        *(
            Picture(what, axis, {"MariaDB": {x: table.growth(what, x) for x in sizes}})
            for what, (axis, sizes) in table.GROWTH.items()
        ),
    ]


def write(rounds: Rounds, directory: Path) -> list[Path]:
    """Draw what was measured at two sizes at least; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures():
        rate = {name: points(rounds, keys, "rate") for name, keys in picture.series.items()}
        p99 = {name: points(rounds, keys, "p99", 1000) for name, keys in picture.series.items()}
        if any(len(found) > 1 for found in rate.values()):
            panels = [("decisions/s", rate), ("p99, ms", p99)]
            path = directory / f"{picture.name}.svg"
            path.write_text(svg(picture.axis, panels), "utf-8")
            written.append(path)
    return written


def points(rounds: Rounds, keys: dict[float, table.Key], figure: str, unit: float = 1) -> Points:
    """The medians of a figure, by x."""
    found = []
    for x, key in keys.items():
        values = [getattr(done[key], figure) / unit for done in rounds if key in done]
        if values:
            found.append((x, statistics.median(values)))
    return found


def svg(axis: str, panels: Sequence[tuple[str, dict[str, Points]]]) -> str:
    """Panels beside each other, x on a logarithmic axis, y from 0."""
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12" fill="none">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
    ]
    for number, (title, series) in enumerate(panels):
        parts += [f'<g transform="translate({number * WIDTH} 0)">']
        parts += [*panel(axis, title, series), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def panel(axis: str, title: str, series: dict[str, Points]) -> list[str]:
    """One panel: axes, their numbers, and a line for each series."""
    xs = sorted({x for found in series.values() for x, _ in found})
    top = nice(max(y for found in series.values() for _, y in found))
    low, high = math.log10(max(xs[0], 0.5)), math.log10(max(xs[-1], 1))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(max(x, 0.5)) - low) / ((high - low) or 1)
        across = LEFT + share * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [text(LEFT, 16, title, weight="bold"), text(WIDTH / 2, HEIGHT - 8, axis, "middle")]
    for step in range(5):
        value = top * step / 4
        _, y = place(xs[0], value)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(
            text(LEFT - 6, y + 4, f"{value:,.4g}" if top < 100 else f"{value:,.0f}", "end")
        )
    for x in xs:
        across, bottom = place(x, 0)
        parts.append(text(across, bottom + 18, f"{x:,.0f}", "middle"))
    for (name, found), colour in zip(series.items(), COLOURS, strict=False):
        places = [place(*point) for point in found]
        path = " ".join(f"{across},{down}" for across, down in places)
        parts.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
        across = LEFT + 90 * list(series).index(name)
        parts.append(f'<circle cx="{across + 5}" cy="28" r="4" fill="{colour}"/>')
        parts.append(text(across + 14, 32, name))
    return parts


def nice(value: float) -> float:
    """The next 1, 2, 4 or 5 times a power of ten, for an axis."""
    power = 10.0 ** math.floor(math.log10(value or 1))
    return next(power * step for step in (1, 2, 4, 5, 10) if power * step >= value)


def text(x: float, y: float, content: str, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="#222"'
    return f'<text x="{x}" y="{y}" {style}>{html.escape(content)}</text>'
