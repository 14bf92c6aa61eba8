"""Figures of the report. Each takes the run and those compared with it, and returns None where there is no data.

One run: a colour per curve. Several: a colour per run, a line style per curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_bpdg.report.heatmap import drift_matrix, epochs
from megatron_bpdg.report.run import Floats, Run
from megatron_bpdg.report.style import (
    ALARM,
    AXIS,
    FAINT,
    LINE_STYLES,
    PALETTE,
    LegendEntries,
    integer_steps,
    new_figure,
)

HALF, FULL = 5.0, 10.4  # inches: narrow enough that labels can be read on a phone
HEIGHT = 2.6
# Above this many points a curve is drawn faint, with its running mean on top.
SMOOTH_ABOVE = 60


@dataclass(frozen=True)
class Panel:
    """A plot of metrics over steps.

    Attributes:
        title: heading, with the unit.
        curves: metric -> label in the legend; those that were not logged are skipped. A metric that ends in ``*`` is
            every one that begins so, and ``{}`` of its label the rest of the name.
        band: (lower, upper) metrics of a shaded band.
        floor: where the vertical axis starts; None: near the lowest value.
        ceiling: where it ends, for fractions that are read by their distance from 1.
        smooth: draw a running mean over many points.
        reference: a horizontal line to compare with.
    """

    title: str
    curves: Mapping[str, str]
    band: tuple[str, str] | None = None
    floor: float | None = 0.0
    ceiling: float | None = None
    smooth: bool = True
    reference: float | None = None


def panel_figure(panel: Panel, runs: list[Run]) -> Figure | None:
    """Draw a panel, or None where none of its metrics was logged."""
    logged = sorted({name for run in runs for name in run.names()})
    curves: dict[str, str] = {}
    for metric, label in panel.curves.items():
        stem, any_rest, _ = metric.partition("*")
        names = [name for name in logged if name.startswith(stem)] if any_rest else [metric] if metric in logged else []
        curves |= {name: label.format(name.removeprefix(stem)) for name in names}
    if not curves:
        return None
    entries = _entries(runs, list(curves.values()))
    # Bands of several runs would only hide each other.
    band = panel.band if len(runs) == 1 else None
    if band is not None:
        entries.append((Patch(color=PALETTE[0], alpha=0.15), " to ".join(name.split("/")[-1] for name in band)))
    if any(np.isnan(run.series(metric)[1]).any() for run in runs for metric in curves):
        entries.append((Line2D([], [], color=ALARM, marker="x", linestyle="none"), "not finite"))
    figure, ax = new_figure(panel.title, entries, HALF, HEIGHT)
    if panel.reference is not None:
        ax.axhline(panel.reference, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    for run_index, run in enumerate(runs):
        if band is not None:
            (steps, low), (_, high) = (run.series(name) for name in band)
            if len(low) == len(high):
                ax.fill_between(steps, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
        for curve_index, metric in enumerate(curves):
            steps, values = run.series(metric)
            _draw_curve(ax, steps, values, *_look(runs, run_index, curve_index), smooth=panel.smooth)
    if panel.floor is not None:
        reach = ax.dataLim.y1 - panel.floor
        ax.set_ylim(panel.floor, panel.floor + (1.06 * reach if 0 < reach < np.inf else 1.0))
    if panel.ceiling is not None:
        ax.set_ylim(top=1.02 * panel.ceiling)  # a line at the ceiling keeps its whole width
    integer_steps(ax)
    return figure


def pass_at_k_figures(runs: list[Run]) -> list[tuple[str, Figure]]:
    """pass@k over steps with 95 % bootstrap intervals: (title, plot) per benchmark and k."""
    benchmarks = dict.fromkeys(benchmark for run in runs for benchmark in run.benchmarks)
    titles = {(name, k): f"{name}: pass@{k}, %" for name in benchmarks for k in runs[0].ks}
    return [(title, _pass_at_k_figure(title, *which, runs)) for which, title in titles.items()]


def _pass_at_k_figure(title: str, benchmark: str, k: int, runs: list[Run]) -> Figure:
    figure, ax = new_figure(title, _entries(runs, [""]), HALF, HEIGHT)
    top = 0.0
    for index, run in enumerate(runs):
        records = [record for record in run.evaluations(benchmark) if record.samples >= k]
        if not records:
            continue
        steps = np.array([record.step for record in records], dtype=np.float64)
        value, low, high = 100 * np.array([record.pass_at(k) for record in records]).T
        top = max(top, float(high.max()))
        color, _ = _look(runs, index, 0)
        if len(records) == 1:
            ax.errorbar(steps, value, [value - low, high - value], color=color, marker="o", markersize=5, capsize=3)
            continue
        ax.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)
        ax.plot(steps, value, color=color, marker="o", markersize=4)
        for at in (0, -1) if len(runs) == 1 else ():
            ax.annotate(
                f"{value[at]:.1f}",
                (steps[at], value[at]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                color=color,
                weight="bold",
            )
    ax.margins(x=0.06)
    ax.set_ylim(0, max(1.15 * top, 1.0))
    integer_steps(ax)
    return figure


def block_index_figure(runs: list[Run]) -> Figure | None:
    """Mean block drift by block index over all steps, a curve per epoch."""
    shown = sorted({epoch for run in runs for epoch in epochs(run)})
    if not shown:
        return None
    entries = _entries(runs, [f"epoch {epoch}" for epoch in shown])
    figure, ax = new_figure("Mean block drift by block index, nats", entries, HALF, HEIGHT)
    for run_index, run in enumerate(runs):
        for epoch_index, epoch in enumerate(shown):
            _, drift, tokens = drift_matrix(run, epoch)
            with np.errstate(invalid="ignore"):
                mean = np.where(tokens > 0, drift * tokens, 0.0).sum(axis=1) / tokens.sum(axis=1)
            look = _look(runs, run_index, epoch_index)
            _draw_curve(ax, np.arange(len(mean), dtype=np.float64), mean, *look, smooth=False)
    ax.set_ylim(bottom=0)
    integer_steps(ax)
    ax.set_xlabel("block index in the response")
    return figure


def time_figure(runs: list[Run]) -> Figure | None:
    """Seconds of a step by phase: stacked over steps for one run, stacked means for several."""
    phases = sorted({name for run in runs for name in run.names("time/")} - {"time/step_s"})
    if not phases:
        return None
    # The largest phase lies at the bottom, where its shape is not bent by the others.
    phases.sort(key=lambda name: -float(np.nansum(runs[0].series(name)[1])))
    tables = [_phase_table(run, phases) for run in runs]
    means = np.array([seconds.sum(axis=1) / max(len(steps), 1) for steps, seconds in tables])
    labels = [name.removeprefix("time/").removesuffix("_s").replace("_", " ") for name in phases] + ["other"]
    if len(runs) == 1:
        labels = [f"{label} {share:.0%}" for label, share in zip(labels, means[0] / (means.sum() or 1.0))]
    colors = [PALETTE[index % len(PALETTE)] for index in range(len(phases))] + [AXIS]
    shown = np.flatnonzero(means.any(axis=0))
    entries: LegendEntries = [(Patch(color=colors[index]), labels[index]) for index in shown]
    if len(runs) == 1:
        figure, ax = new_figure("Seconds per step by phase", entries, FULL, HEIGHT)
        steps, seconds = tables[0]
        ax.stackplot(steps, seconds[shown], colors=[colors[index] for index in shown], step="mid", linewidth=0)
        ax.margins(x=0)
        ax.set_ylim(bottom=0)
        integer_steps(ax)
        return figure
    figure, ax = new_figure("Mean seconds per step by phase", entries, FULL, 0.9 + 0.5 * len(runs))
    rows, ends = np.arange(len(runs)), means.cumsum(axis=1)
    for index in shown:
        ax.barh(rows, means[:, index], left=ends[:, index] - means[:, index], color=colors[index], height=0.4)
    ax.set_ylim(len(runs) - 0.7, -0.75)
    ax.set_yticks([])
    ax.grid(axis="y", visible=False)
    # Names of any length fit above the bars, not beside them.
    for row, run in enumerate(runs):
        ax.annotate(run.name, (0, row - 0.25), xytext=(0, 1), textcoords="offset points", size=9)
    ax.set_xlabel("seconds")
    return figure


def _phase_table(run: Run, phases: list[str]) -> tuple[Floats, Floats]:
    """Steps, and seconds by phase and step; the last row is what no phase accounts for."""
    rows = [row for row in run.metrics if any(row.get(name) is not None for name in phases)]
    seconds = np.array([[row.get(name) or 0.0 for row in rows] for name in phases], dtype=np.float64)
    whole = np.array([row.get("time/step_s") or 0.0 for row in rows], dtype=np.float64)
    other = np.clip(whole - seconds.sum(axis=0), 0.0, None)
    return np.array([row["step"] for row in rows], dtype=np.float64), np.vstack([seconds, other])


def _look(runs: list[Run], run_index: int, curve_index: int) -> tuple[str, str]:
    """(colour, line style) of a curve."""
    if len(runs) == 1:
        return PALETTE[curve_index % len(PALETTE)], "-"
    return PALETTE[run_index % len(PALETTE)], LINE_STYLES[curve_index % len(LINE_STYLES)]


def _entries(runs: list[Run], labels: list[str]) -> LegendEntries:
    """Legend of runs by colour, then of curves by line style; of curves by colour where there is one run."""
    if len(runs) == 1:
        return [(Line2D([], [], color=_look(runs, 0, index)[0]), label) for index, label in enumerate(labels)]
    entries: LegendEntries = [(Patch(color=_look(runs, i, 0)[0]), run.name) for i, run in enumerate(runs)]
    if len(labels) > 1:
        entries += [
            (Line2D([], [], color=FAINT, ls=_look(runs, 0, index)[1]), label) for index, label in enumerate(labels)
        ]
    return entries


def _draw_curve(ax: Axes, steps: Floats, values: Floats, color: str, line_style: str, *, smooth: bool) -> None:
    if smooth and len(values) > SMOOTH_ABOVE:
        ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.9)
        ax.plot(steps, running_mean(values), color=color, linestyle=line_style)
    else:
        marker = "o" if len(values) <= 20 else None
        ax.plot(steps, values, color=color, linestyle=line_style, marker=marker, markersize=3)
    missing = steps[np.isnan(values)]
    if len(missing):
        height = np.full(len(missing), 0.04)
        ax.plot(missing, height, transform=ax.get_xaxis_transform(), color=ALARM, marker="x", linestyle="none")


def running_mean(values: Floats) -> Floats:
    """Centred mean over a twentieth of the points (at least 5), shorter at the ends; NaN is left out."""
    half = max(len(values) // 40, 2)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    reach = np.minimum.reduce([index, len(values) - 1 - index, np.full(len(values), half)])
    first, last = index - reach, index + reach + 1
    with np.errstate(invalid="ignore"):
        mean: Floats = (total[last] - total[first]) / (count[last] - count[first])
    return mean
