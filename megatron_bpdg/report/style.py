"""How figures look, and how they become SVG that can stand inside a page."""

from __future__ import annotations

import html
import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# The colours of the light page; `figure_svg` turns them into the style sheet's variables, which a dark page sets anew.
PALETTE = ("#2563eb", "#ea580c", "#0d9488", "#9333ea", "#db2777", "#65a30d", "#0891b2", "#b45309")
LINE_STYLES = ("-", "--", ":", "-.")
INK = "#1f2937"
FAINT = "#6b7280"
AXIS = "#9ca3af"
GRID = "#e5e7eb"
ALARM = "#b91c1c"
HEAT = "viridis"  # reads on white and on black
_NAMES = {INK: "ink", FAINT: "faint", AXIS: "axis", GRID: "line", ALARM: "bad"}
_NAMES |= {color: f"c{index}" for index, color in enumerate(PALETTE)}
_VARIABLES = {color: f"var(--{name})" for color, name in _NAMES.items()}

_RC: Any = {
    # Text stays text: the page's own font draws it, and it can be searched.
    "svg.fonttype": "none",
    # Ids of clip paths are hashes of this and their content: reports of the same data are the same bytes.
    "svg.hashsalt": "bpdg",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def style() -> Any:
    """Context in which figures are built and saved."""
    return mpl.rc_context(_RC)


def new_figure(width: float, height: float, header: float) -> tuple[Figure, Axes]:
    """Figure of this size in inches and its axes.

    Margins are fixed in inches, so that axes of different figures line up on the page. `header` is the room above the
    axes for title and legend.
    """
    figure = Figure(figsize=(width, height))
    left, right, bottom = 0.7, 0.12, 0.5
    inner = (width - left - right, height - bottom - header)
    return figure, figure.add_axes((left / width, bottom / height, inner[0] / width, inner[1] / height))


def integer_steps(ax: Axes) -> None:
    """Label the horizontal axis as training steps, whole numbers only."""
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def plain_numbers(ax: Axes) -> None:
    """Label the vertical axis with plain numbers, without a common factor written above the axis."""
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


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


def title_with_legend(ax: Axes, title: str, entries: LegendEntries, shape: tuple[int, int]) -> None:
    """Title over legend over plot: the legend never covers a curve. `shape` is what `legend_rows` gave."""
    rows, columns = shape
    ax.set_title(title, pad=7 + 72 * LEGEND_ROW * rows)
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


def figure_svg(figure: Figure, label: str) -> str:
    """Inline SVG of a figure, as wide as its container.

    Args:
        figure: built within `style()`.
        label: read out by screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several figures share a page: only ids that something refers to (named by content) may stay.
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    kept = {name for pair in used for name in pair if name}
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in kept else "", svg)
    svg = re.sub("|".join(f"(?<=: ){color}" for color in _VARIABLES), lambda match: _VARIABLES[match[0]], svg)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    opening = f'<svg {namespaces} {box[0]} role="img" aria-label="{html.escape(label)}">'
    return opening + svg[svg.index(">") + 1 :]
