"""The picture: throughput, processor time and memory of everybody, as an SVG of bars.

Written by hand: bars and words are a few lines of SVG, which stays readable as text and small in the repository, where a plotting
library would bring eighty megabytes of packages for one picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tests.bench.machine import GIB, MIB
from tests.bench.report import Figures, figures
from tests.bench.runner import Outcome

NAMES, PANEL, GAP = 190, 210, 30  # widths
BAR, STEP, HEAD = 13, 19, 46  # heights
OURS, OTHERS, LIMIT = "#0b6e99", "#b8bec4", "#5f6b76"


@dataclass(frozen=True)
class Panel:
    title: str
    value: Callable[[Figures], float]
    shown: str


def draw(outcomes: Sequence[Outcome], caption: str) -> str:
    """One block of bars for each outcome that moved bytes."""
    body, y = [], 30.0
    for outcome in outcomes:
        block, height = _block(outcome, y)
        body += block
        y += height
    width = NAMES + 3 * (PANEL + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 10:.0f}" width="{width}" role="img"'
        ' font-family="system-ui, sans-serif" font-size="11">',
        f"<title>{escape(caption)}</title>",
        f'<rect width="{width}" height="{y + 10:.0f}" fill="#ffffff"/>',
        f'<text x="8" y="18" fill="#24292f" font-size="12">{escape(caption)}</text>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _block(outcome: Outcome, top: float) -> tuple[list[str], float]:
    found, data = figures(outcome), outcome.row.bytes_of(outcome.amount)
    panels = (
        Panel("MiB/s (more is better)", lambda each: data / MIB / each.own_wall, "{:.0f}"),
        Panel("CPU seconds per GiB (less is better)", lambda each: each.own_cpu * GIB / data, "{:.2f}"),
        Panel("peak memory, MiB (less is better)", lambda each: each.peak / MIB, "{:.0f}"),
    )
    lines = [_text(8, top + 18, outcome.row.title, weight="bold")]
    for row, each in enumerate(found):
        lines.append(_text(NAMES - 6, top + HEAD + row * STEP + BAR - 3, each.name, anchor="end", colour=_colour(each, text=True)))
    for number, panel in enumerate(panels):
        x = NAMES + number * (PANEL + GAP)
        lines.append(_text(x, top + HEAD - 8, panel.title, colour="#57606a"))
        most = max((panel.value(each) for each in found), default=1.0)
        for row, each in enumerate(found):
            value = panel.value(each)
            length, y = max(1.0, value / most * (PANEL - 40)), top + HEAD + row * STEP
            lines.append(f'<rect x="{x}" y="{y:.0f}" width="{length:.1f}" height="{BAR}" fill="{_colour(each)}"/>')
            lines.append(_text(x + length + 4, y + BAR - 3, panel.shown.format(value)))
    return lines, HEAD + len(found) * STEP + 12


def _colour(each: Figures, *, text: bool = False) -> str:
    if each.name.startswith("bits"):
        return OURS
    if text:
        return "#24292f"
    return LIMIT if each.name.startswith("C,") else OTHERS


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal", colour: str = "#24292f") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}">{escape(words)}</text>'
