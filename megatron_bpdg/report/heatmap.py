"""The drift heat map: block index x step, one panel per run and epoch."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_bpdg.report.run import Floats, Run
from megatron_bpdg.report.style import GRID, HEAT, integer_steps

MAX_CELLS = 400  # cells along each axis; more could not be told apart on a page


def epochs(run: Run) -> list[int]:
    """Epochs with recorded drift, ascending."""
    return sorted({row["epoch"] for row in run.drift})


def drift_matrix(run: Run, epoch: int) -> tuple[Floats, Floats, Floats]:
    """Drift of one epoch over its updates.

    Returns:
        steps float64, mean block drift in nats by block and step, weighted by tokens (NaN where no token was),
        and their tokens.
    """
    rows = [row for row in run.drift if row["epoch"] == epoch]
    logged = sorted({row["step"] for row in rows})
    # Steps that are missing (a rollout without a single token) are columns too: the axis has to stay linear.
    stride = math.gcd(*np.diff(logged).tolist()) or 1
    steps = list(range(logged[0], logged[-1] + 1, stride)) if logged else []
    column = {step: index for index, step in enumerate(steps)}
    blocks = max((len(row["tokens_by_block"]) for row in rows), default=0)
    total, tokens = np.zeros((blocks, len(steps))), np.zeros((blocks, len(steps)))
    for row in rows:
        drift = np.array(row["abs_drift_by_block"], dtype=float)  # None becomes NaN
        weight = np.where(np.isfinite(drift), row["tokens_by_block"], 0.0)
        at = (slice(len(drift)), column[row["step"]])
        total[at] += np.where(weight > 0, drift, 0.0) * weight
        tokens[at] += weight
    with np.errstate(invalid="ignore"):
        return np.array(steps, dtype=float), total / tokens, tokens


def heatmap_figure(runs: list[Run]) -> Figure | None:
    """Panels share their colour scale, which ends at the 99th percentile so that one outlier cannot flatten it."""
    panels = [(run, epoch, *drift_matrix(run, epoch)) for run in runs for epoch in epochs(run)]
    panels = [panel for panel in panels if np.isfinite(panel[3]).any()]
    if not panels:
        return None
    top = float(np.nanpercentile(np.concatenate([panel[3].ravel() for panel in panels]), 99))
    scale = Normalize(0.0, top or 1.0)
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10.4, 0.4 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, (run, epoch, steps, drift, tokens) in zip(axes.ravel(), panels):
        # The picture ends half a cell outside the first and the last step.
        half = (steps[-1] - steps[0]) / (len(steps) - 1) / 2 if len(steps) > 1 else 0.5
        image = ax.imshow(
            _coarsen(drift, tokens),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap=HEAT,
            norm=scale,
            extent=(steps[0] - half, steps[-1] + half, -0.5, len(drift) - 0.5),
        )
        ax.set_facecolor(GRID)
        ax.grid(visible=False)
        ax.set_title(f"Block drift, epoch {epoch}" if len(runs) == 1 else f"{run.name}, epoch {epoch}")
        integer_steps(ax)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes[0, 0].set_ylim(-0.5, max(len(panel[3]) for panel in panels) - 0.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("block index")
    for ax in axes.ravel()[len(panels) :]:
        ax.set_visible(False)
    bar = figure.colorbar(image, ax=axes, extend="max", extendfrac=0.04 / rows, pad=0.015, aspect=22 * rows)
    bar.set_label("mean block drift, nats")
    bar.outline.set_visible(False)
    return figure


def _coarsen(drift: Floats, tokens: Floats) -> Floats:
    """Token-weighted means over bins, where an axis has more than MAX_CELLS cells."""
    total = np.where(tokens > 0, drift, 0.0) * tokens
    for axis in (0, 1):
        if tokens.shape[axis] > MAX_CELLS:
            starts = np.linspace(0, tokens.shape[axis], MAX_CELLS, endpoint=False).astype(int)
            total, tokens = np.add.reduceat(total, starts, axis), np.add.reduceat(tokens, starts, axis)
    with np.errstate(invalid="ignore"):
        return total / tokens
