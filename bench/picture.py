"""One scatter plot as SVG, without a plotting library."""

from __future__ import annotations

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 64, 56
INK, FAINT, GRID = "#1f2933", "#66727f", "#e4e8ec"


class Point(NamedTuple):
    x: float
    y: float
    label: str
    right: bool = True  # the label's side


class Series(NamedTuple):
    name: str
    colour: str
    points: list[Point]
    line: bool = False


def scatter(
    title: str,
    subtitle: str,
    x_name: str,
    y_name: str,
    series: list[Series],
    x_ticks: list[float],
    y_ticks: list[float],
) -> str:
    """x logarithmic, y linear and in per cent; the outer ticks bound the axes."""
    x_low, x_high = x_ticks[0] / 1.04, x_ticks[-1] * 1.04

    def x_at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / x_low) / math.log(x_high / x_low)

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    def text(x: float, y: float, what: str, size: int = 12, at: str = "start", fill: str = INK, more: str = "") -> str:
        look = f'font-size="{size}" text-anchor="{at}" fill="{fill}" {more}'
        return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(what)}</text>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 28, title, 17, more='font-weight="600"'),
        text(LEFT, 48, subtitle, 12, fill=FAINT),
    ]
    for tick in x_ticks:
        x = x_at(tick)
        out.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        out.append(text(x, HEIGHT - BOTTOM + 18, f"{tick:g}", at="middle", fill=FAINT))
    for tick in y_ticks:
        y = y_at(tick)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        out.append(text(LEFT - 8, y + 4, f"{100 * tick:g} %", at="end", fill=FAINT))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_name, at="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(text(18, middle, y_name, at="middle", more=f'transform="rotate(-90 18 {middle:.1f})"'))

    for s in series:
        if s.line:
            path = " ".join(f"{x_at(p.x):.1f},{y_at(p.y):.1f}" for p in sorted(s.points))
            out.append(f'<polyline points="{path}" fill="none" stroke="{s.colour}" stroke-width="1.5" opacity="0.5"/>')
        for p in s.points:
            x, y = x_at(p.x), y_at(p.y)
            out.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{s.colour}" stroke="#ffffff" stroke-width="1.5"/>'
            )
            out.append(text(x + (9 if p.right else -9), y + 4, p.label, 11, "start" if p.right else "end"))
    named = [s for s in series if s.name]
    for i, s in enumerate(named):
        y = TOP + 16 + 18 * i
        x = WIDTH - RIGHT - 236
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{s.colour}"/>')
        out.append(text(x + 12, y, s.name, 12))
    return "\n".join([*out, "</svg>", ""])
