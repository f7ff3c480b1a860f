"""Two pictures as self-contained SVG: where a pair pays (a map), and where it stands among plain engines (a frontier).

Knows colours and axes, nothing of how figures come about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

GAIN, LOSS, PAIR, PLAIN, OTHER = "#2a7f8e", "#c2583a", "#c2583a", "#33608c", "#777777"
HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">'


@dataclass(frozen=True)
class Panel:
    title: str
    value: Callable[[int, float], float]  # prompt tokens, link in bit/s -> seconds


def gain_map(
    title: str,
    panels: Sequence[Panel],
    *,
    prompts: Sequence[int],
    links_bits_per_s: Sequence[float],
    caption: Sequence[str],
) -> str:
    """A panel of cells each: prompt length to the right, link speed upwards, seconds gained or lost inside."""
    cell_width, cell_height, left, top, apart = 58, 34, 92, 84, 26
    panel_width = cell_width * len(prompts)
    width = left + len(panels) * (panel_width + apart)
    bottom = top + cell_height * len(links_bits_per_s)
    height = bottom + 66 + 18 * len(caption)
    most = max(abs(p.value(n, link)) for p in panels for n in prompts for link in links_bits_per_s)
    out = [HEAD.format(width=width, height=height), f'<rect width="{width}" height="{height}" fill="white"/>']
    out.append(_text(left, 28, title, size=17))
    for number, panel in enumerate(panels):
        x0 = left + number * (panel_width + apart)
        out.append(_text(x0, top - 14, panel.title, size=14))
        for row, link in enumerate(reversed(links_bits_per_s)):
            y = top + row * cell_height
            if number == 0:
                out.append(_text(left - 8, y + 22, _bits(link), anchor="end"))
            for column, tokens in enumerate(prompts):
                seconds = panel.value(tokens, link)
                x = x0 + column * cell_width
                strength = 0.12 + 0.8 * math.sqrt(abs(seconds) / most)
                fill = GAIN if seconds > 0 else LOSS
                ink = "white" if strength > 0.55 else "#222"
                out.append(
                    f'<rect x="{x}" y="{y}" width="{cell_width - 1}" height="{cell_height - 1}" fill="{fill}" '
                    f'fill-opacity="{strength:.2f}"/>'
                )
                out.append(_text(x + cell_width / 2, y + 22, _seconds(seconds), anchor="middle", fill=ink))
        for column, tokens in enumerate(prompts):
            out.append(_text(x0 + (column + 0.5) * cell_width, bottom + 18, f"{tokens:,}", anchor="middle"))
        out.append(_text(x0 + panel_width / 2, bottom + 38, "tokens of the prompt", anchor="middle"))
    for line, words in enumerate(caption):
        out.append(_text(left, bottom + 64 + 18 * line, words, fill="#444"))
    return "\n".join([*out, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Mark:
    """One arm: where it stands, and what is written there. Marks of one `line` are joined."""

    label: str
    x: float
    y: float
    colour: str
    line: str = ""


def frontier(title: str, marks: Sequence[Mark], *, x_label: str, y_label: str, caption: Sequence[str]) -> str:
    """Points on two logarithmic axes; lower and further left is better on both."""
    width, left, top, right, plot_height = 860, 90, 60, 700, 380
    bottom = top + plot_height
    height = bottom + 66 + 18 * len(caption)
    x_low, x_high = _reach([mark.x for mark in marks])
    y_low, y_high = _reach([mark.y for mark in marks])

    def at_x(value: float) -> float:
        return left + (right - left) * math.log(value / x_low) / math.log(x_high / x_low)

    def at_y(value: float) -> float:
        return bottom - plot_height * math.log(value / y_low) / math.log(y_high / y_low)

    out = [HEAD.format(width=width, height=height), f'<rect width="{width}" height="{height}" fill="white"/>']
    out.append(_text(left, 28, title, size=17))
    for value in _ticks(x_low, x_high):
        out.append(_line(at_x(value), top, at_x(value), bottom, "#ddd"))
        out.append(_text(at_x(value), bottom + 18, f"{value:g}", anchor="middle"))
    for value in _ticks(y_low, y_high):
        out.append(_line(left, at_y(value), right, at_y(value), "#ddd"))
        out.append(_text(left - 8, at_y(value) + 4, f"{value:g}", anchor="end"))
    out.append(_text((left + right) / 2, bottom + 40, x_label, anchor="middle"))
    out.append(_text(left, top - 10, y_label))
    for name in dict.fromkeys(mark.line for mark in marks if mark.line):
        joined = sorted((mark for mark in marks if mark.line == name), key=lambda mark: mark.y)
        points = " ".join(f"{at_x(mark.x):.1f},{at_y(mark.y):.1f}" for mark in joined)
        out.append(f'<polyline points="{points}" fill="none" stroke="{joined[0].colour}" stroke-opacity="0.5"/>')
    for mark in marks:
        x, y = at_x(mark.x), at_y(mark.y)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{mark.colour}"/>')
        out.append(_text(x + 10, y + 4, mark.label, fill=mark.colour))
    for number, words in enumerate(caption):
        out.append(_text(left, bottom + 66 + 18 * number, words, fill="#444"))
    return "\n".join([*out, "</svg>"]) + "\n"


def _reach(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.35, max(values) * 1.35


def _ticks(low: float, high: float) -> list[float]:
    steps = [
        digit * 10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in (1, 2, 3, 4, 5, 7)
    ]  # fmt: skip
    few = [step for step in steps if low <= step <= high]
    return few if len(few) <= 9 else [step for step in few if f"{step:e}"[0] in "125"]


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, fill: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(words)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _bits(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e9:g} Gbit/s" if bits_per_s >= 1e9 else f"{bits_per_s / 1e6:g} Mbit/s"


def _seconds(seconds: float) -> str:
    text = f"{seconds:+.1f}" if abs(seconds) >= 1 else f"{seconds:+.2f}"
    return text.replace("-", "−")
