"""Figures of the report. Each takes the run and those compared with it, and returns None where there is no data.

One run: a colour per curve. Several: a colour per run, a line style per curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_bpdg.report.compare import estimate
from megatron_bpdg.report.heatmap import drift_matrix, epochs
from megatron_bpdg.report.run import Floats, Run
from megatron_bpdg.report.style import (
    ALARM,
    AXIS,
    FAINT,
    LEGEND_ROW,
    LINE_STYLES,
    PALETTE,
    LegendEntries,
    integer_steps,
    legend_rows,
    new_figure,
    plain_numbers,
    title_with_legend,
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
        curves: metric -> label in the legend; those that were not logged are skipped.
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
    curves = [metric for metric in panel.curves if any(len(run.series(metric)[0]) for run in runs)]
    if not curves:
        return None
    entries = _entries(runs, [panel.curves[metric] for metric in curves])
    if panel.band is not None and len(runs) == 1:
        low, high = (name.split("/")[-1] for name in panel.band)
        entries.append((Patch(color=PALETTE[0], alpha=0.15), f"{low} to {high}"))
    if any(np.isnan(run.series(metric)[1]).any() for run in runs for metric in curves):
        entries.append((Line2D([], [], color=ALARM, marker="x", linestyle="none"), "not finite"))
    figure, ax = _single(panel.title, entries, HALF, HEIGHT)
    if panel.reference is not None:
        ax.axhline(panel.reference, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    for run_index, run in enumerate(runs):
        # Bands of several runs would only hide each other.
        if panel.band is not None and len(runs) == 1:
            _draw_band(ax, run, panel.band)
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


def discovered_panel(
    title: str, prefix: str, runs: list[Run], label: Callable[[str], str], floor: float | None = 0.0
) -> Panel:
    """A panel of every metric whose name starts with `prefix`; `label` turns the rest of the name into a label."""
    names = sorted({name for run in runs for name in run.names(prefix)})
    return Panel(title, {name: label(name.removeprefix(prefix)) for name in names}, floor=floor)


def pass_at_k_figures(runs: list[Run]) -> list[tuple[str, Figure]]:
    """pass@k over steps with 95 % bootstrap intervals: (title, plot) per benchmark and k."""
    benchmarks = dict.fromkeys(benchmark for run in runs for benchmark in run.benchmarks)
    return [_pass_at_k_figure(benchmark, k, runs) for benchmark in benchmarks for k in runs[0].ks]


def _pass_at_k_figure(benchmark: str, k: int, runs: list[Run]) -> tuple[str, Figure]:
    title = f"{benchmark}: pass@{k}, %"
    figure, ax = _single(title, _entries(runs, [""]), HALF, HEIGHT)
    top = 0.0
    for index, run in enumerate(runs):
        records = [record for record in run.evaluations(benchmark) if record.samples >= k]
        if not records:
            continue
        estimates = [estimate(record, k) for record in records]
        steps = np.array([record.step for record in records], dtype=np.float64)
        value = 100 * np.array([interval.value for interval in estimates])
        low = 100 * np.array([interval.low for interval in estimates])
        high = 100 * np.array([interval.high for interval in estimates])
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
    return title, figure


def block_index_figure(runs: list[Run]) -> Figure | None:
    """Mean block drift by block index over all steps, a curve per epoch."""
    shown = sorted({epoch for run in runs for epoch in epochs(run)})
    if not shown:
        return None
    entries = _entries(runs, [f"epoch {epoch}" for epoch in shown])
    figure, ax = _single("Mean block drift by block index, nats", entries, HALF, HEIGHT)
    for run_index, run in enumerate(runs):
        for epoch_index, epoch in enumerate(shown):
            _, drift_BS, tokens_BS = drift_matrix(run, epoch)
            tokens_B = tokens_BS.sum(axis=1)
            with np.errstate(invalid="ignore"):
                drift_B = np.where(tokens_BS > 0, drift_BS * tokens_BS, 0.0).sum(axis=1) / tokens_B
            look = _look(runs, run_index, epoch_index)
            _draw_curve(ax, np.arange(len(drift_B), dtype=np.float64), drift_B, *look, smooth=False)
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
    labels = [name.removeprefix("time/").removesuffix("_s").replace("_", " ") for name in phases] + ["other"]
    return _stacked_steps(labels, *tables[0]) if len(runs) == 1 else _stacked_means(labels, runs, tables)


def _stacked_steps(labels: list[str], steps_S: Floats, seconds_PS: Floats) -> Figure:
    share_P = seconds_PS.sum(axis=1) / (seconds_PS.sum() or 1.0)
    colors = _phase_colors(labels)
    shown = [index for index in range(len(labels)) if share_P[index] > 0]
    entries: LegendEntries = [(Patch(color=colors[i]), f"{labels[i]} {share_P[i]:.0%}") for i in shown]
    figure, ax = _single("Seconds per step by phase", entries, FULL, HEIGHT)
    bottom_S = np.zeros_like(steps_S)
    for index in shown:
        top_S = bottom_S + seconds_PS[index]
        ax.fill_between(steps_S, bottom_S, top_S, step="mid", color=colors[index], linewidth=0)
        bottom_S = top_S
    ax.margins(x=0)
    ax.set_ylim(bottom=0)
    integer_steps(ax)
    return figure


def _stacked_means(labels: list[str], runs: list[Run], tables: list[tuple[Floats, Floats]]) -> Figure:
    means_RP = np.array([seconds_PS.sum(axis=1) / max(len(steps_S), 1) for steps_S, seconds_PS in tables])
    colors = _phase_colors(labels)
    shown = [index for index in range(len(labels)) if means_RP[:, index].any()]
    entries: LegendEntries = [(Patch(color=colors[index]), labels[index]) for index in shown]
    figure, ax = _single("Mean seconds per step by phase", entries, FULL, 0.9 + 0.5 * len(runs))
    left_R = np.zeros(len(runs))
    rows = np.arange(len(runs))
    for index in shown:
        ax.barh(rows, means_RP[:, index], left=left_R, color=colors[index], height=0.4)
        left_R += means_RP[:, index]
    ax.set_ylim(len(runs) - 0.7, -0.75)
    ax.set_yticks([])
    ax.grid(axis="y", visible=False)
    # Names of any length fit above the bars, not beside them.
    for row, run in enumerate(runs):
        ax.annotate(run.name, (0, row - 0.25), xytext=(0, 1), textcoords="offset points", size=9)
    ax.set_xlabel("seconds")
    return figure


def _phase_colors(labels: list[str]) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(len(labels) - 1)] + [AXIS]


def _phase_table(run: Run, phases: list[str]) -> tuple[Floats, Floats]:
    """Steps ``[S]`` and seconds ``[P + 1, S]`` by phase, the last row being what no phase accounts for."""
    rows = [row for row in run.metrics if any(row.get(name) is not None for name in phases)]
    steps_S = np.array([row["step"] for row in rows], dtype=np.float64)
    seconds_PS = np.array([[row.get(name) or 0.0 for row in rows] for name in phases], dtype=np.float64)
    step_S = np.array([row.get("time/step_s") or 0.0 for row in rows], dtype=np.float64)
    other_S = np.clip(step_S - seconds_PS.sum(axis=0), 0.0, None)
    return steps_S, np.vstack([seconds_PS, other_S])


def _single(title: str, entries: LegendEntries, width: float, height: float) -> tuple[Figure, Axes]:
    """Figure of one plot whose area stays the same however many rows the legend has."""
    shape = legend_rows([label for _, label in entries], width - 0.7)
    header = 0.3 + LEGEND_ROW * shape[0]
    figure, ax = new_figure(width, height + LEGEND_ROW * shape[0], header)
    title_with_legend(ax, title, entries, shape)
    plain_numbers(ax)
    return figure, ax


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


def _draw_band(ax: Axes, run: Run, band: tuple[str, str]) -> None:
    (steps, low), (_, high) = run.series(band[0]), run.series(band[1])
    if len(steps) and len(low) == len(high):
        ax.fill_between(steps, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)


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
