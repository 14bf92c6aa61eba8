"""How figures look, and how they become SVG that can stand inside a page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

_TEMPLATES = Path(__file__).parent / "templates"
# The colours of the light page; `figure_svg` turns them back into the page's variables, which a dark page sets anew.
_COLORS = dict(re.findall(r"--(\w+): (#\w{6})", (_TEMPLATES / "style.css").read_text().partition("@media")[0]))
PALETTE = tuple(_COLORS[f"c{index}"] for index in range(8))
LINE_STYLES = ("-", "--", ":", "-.")
FAINT, AXIS, GRID, ALARM = (_COLORS[name] for name in ("faint", "axis", "line", "bad"))
HEAT = "viridis"  # reads on white and on black
_VARIABLES = {color: f"var(--{name})" for name, color in _COLORS.items() if name != "paper"}


def style() -> Any:
    """Context in which figures are built and saved."""
    return mpl.rc_context(fname=_TEMPLATES / "figures.mplstyle")


def integer_steps(ax: Axes) -> None:
    """Label the horizontal axis as training steps, whole numbers only."""
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def number(value: float) -> str:
    """A tick's label: 0.25, 9500, 2.2e-6."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.3g}".split("e")
    return f"{mantissa}e{int(exponent)}"


LegendEntries = list[tuple[Artist, str]]
LEGEND_ROW = 0.18  # inches


def legend_rows(labels: list[str], width: float) -> tuple[int, int]:
    """(rows, columns) of a legend with these labels over `width` inches; none is drawn for a single label."""
    if len(labels) < 2:
        return 0, 0
    widths = [0.5 + 0.08 * len(label) for label in labels]
    columns = len(labels) if sum(widths) <= width else max(int(width / max(widths)), 1)
    return -(-len(labels) // columns), columns


def new_figure(title: str, entries: LegendEntries, width: float, height: float) -> tuple[Figure, Axes]:
    """Figure and axes, title over legend over plot: the legend never covers a curve.

    Sizes are inches, `height` without the legend. Margins are fixed, so that axes of different figures line up on the
    page, and the plot's area stays the same however many rows the legend has.
    """
    left, right, bottom = 0.7, 0.12, 0.5
    rows, columns = legend_rows([label for _, label in entries], width - left)
    legend = LEGEND_ROW * rows
    figure = Figure(figsize=(width, height + legend))
    box = (left, bottom, width - left - right, height - bottom - 0.3)
    ax = figure.add_axes((box[0] / width, box[1] / (height + legend), box[2] / width, box[3] / (height + legend)))
    ax.set_title(title, pad=7 + 72 * legend)
    if rows:
        ax.legend(
            [artist for artist, _ in entries],
            [label for _, label in entries],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=columns,
            borderaxespad=0.2,
            borderpad=0.0,
            labelspacing=0.35,
            handlelength=1.4,
            columnspacing=1.4,
        )
    # Plain numbers, without a common factor written above the axis.
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    return figure, ax


def figure_svg(figure: Figure, label: str) -> Markup:
    """Inline SVG of a figure made within `style()`, as wide as its container; screen readers read out the label."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    # Several figures share a page: only ids that something refers to (named by content) may stay.
    kept = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in kept else "", svg)
    svg = re.sub("|".join(f"(?<=: ){color}" for color in _VARIABLES), lambda match: _VARIABLES[match[0]], svg)
    # For matplotlib's own opening tag, which has a fixed size.
    _, box, drawing = re.split(r'<svg[^>]*(viewBox="[^"]+")[^>]*>', svg, maxsplit=1)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    # The rest is matplotlib's, which escapes the names inside.
    return Markup(f'<svg {namespaces} {box} role="img" aria-label="{escape(label)}">{drawing}')
