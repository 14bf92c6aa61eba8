"""The report: one self-contained HTML page about a run, alone or beside others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from megatron_bpdg.evaluation.bootstrap import Interval
from megatron_bpdg.report.facts import headline, run_facts, warnings_card
from megatron_bpdg.report.heatmap import heatmap_figure
from megatron_bpdg.report.passk import Comparison, before_and_after, comparison, points
from megatron_bpdg.report.plots import (
    Curve,
    Panel,
    block_index_figure,
    discovered_panel,
    panel_figure,
    pass_at_k_figures,
    time_figure,
)
from megatron_bpdg.report.run import Run, load_runs
from megatron_bpdg.report.style import figure_svg, style
from megatron_bpdg.report.template import absent, escape, facts, figure, figures, page, section, table
from megatron_bpdg.tracking.files import write_text

REPORT_FILE = "report.html"
_SAMPLE_CHARACTERS = 4000


def write_report(run_dir: Path, compare: Sequence[Path] = ()) -> Path:
    """Write `run_dir/report.html` and return its path.

    Args:
        run_dir: a run's directory: config.yaml, metrics.jsonl, drift.jsonl, eval.jsonl, samples.jsonl; any may be
            missing, its section then says so.
        compare: directories of further runs to draw into the same figures.

    Raises:
        FileNotFoundError: a directory holds no run.
        ValueError: a damaged file, or the same run given twice.
    """
    runs = load_runs(run_dir, list(compare))
    destination = run_dir / REPORT_FILE
    write_text(destination, render(runs))
    return destination


def render(runs: list[Run]) -> str:
    """The page's markup for the first run, with the others drawn beside it."""
    run = runs[0]
    sections = [
        _results(runs),
        _panels("learning", "Learning", _LEARNING_ABOUT, _learning(runs), runs),
        _panels("gate", "Gate", _GATE_ABOUT, _GATE, runs),
        _drift(runs),
        _panels("mismatch", "Sampler against trainer", _MISMATCH_ABOUT, _MISMATCH, runs),
        _panels("rollouts", "Rollouts", _ROLLOUT_ABOUT, _ROLLOUTS, runs),
        _time(runs),
        _samples(run),
        _config(runs),
    ]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in _CONTENTS)
    comparison = f", compared with {', '.join(other.name for other in runs[1:])}" if len(runs) > 1 else ""
    header = (
        f'<header><h1>{escape(run.name)}</h1><p class="lead">{escape(headline(run) + comparison)}</p>'
        f"<nav>{links}</nav></header>"
    )
    summary = f'<section id="facts">{facts(run_facts(run))}</section>'
    footer = "<footer>Made by bpdg. Curves of many points are drawn faint, with their running mean on top.</footer>"
    return page(f"{run.name}: bpdg report", "".join([header, summary, warnings_card(runs), *sections, footer]))


_CONTENTS = (
    ("results", "Results"),
    ("learning", "Learning"),
    ("gate", "Gate"),
    ("drift", "Drift"),
    ("mismatch", "Mismatch"),
    ("rollouts", "Rollouts"),
    ("time", "Time"),
    ("samples", "Samples"),
    ("config", "Config"),
)

_LEARNING_ABOUT = (
    "The teacher gap is the mean of log q - log π on the sampled tokens: it rises towards 0 as the student becomes the "
    "teacher. The gradient norm and the loss are means over the updates of a step."
)
_GATE_ABOUT = (
    "The raw gate is exp(-τ · block drift), before its mean is scaled to 1: at 1 the gate does nothing. The effective "
    "sample size is (Σg)² / (nΣg²) over tokens; at 1 all tokens count alike."
)
_MISMATCH_ABOUT = (
    "Log-probs of the same tokens under the same weights, by the sampler and by the trainer. Differences beyond "
    "rounding mean that the two do not sample and train the same distribution."
)
_ROLLOUT_ABOUT = "What the student sampled for training, before it was updated on it."

_GATE = (
    Panel(
        "Gate",
        (Curve("gate/mean", "mean"), Curve("gate/min", "min"), Curve("gate/q50", "median")),
        band=("gate/q05", "gate/q95"),
    ),
    Panel("Effective sample size, fraction of tokens", (Curve("gate/ess", "ESS"),)),
)
_MISMATCH = (
    Panel("|log π sampler - log π trainer|, mean, nats", (Curve("mismatch/abs_mean", "mean"),)),
    Panel("KL(sampler ‖ trainer), nats per token", (Curve("mismatch/kl", "KL"),)),
)
_ROLLOUTS = (
    Panel("Reward, graded fraction right", (Curve("rollout/reward_mean", "reward"),)),
    Panel("Student entropy, nats per token", (Curve("actor/entropy", "entropy"),)),
    Panel("Response length, tokens", (Curve("rollout/response_tokens_mean", "mean"),)),
    Panel("Truncated responses, fraction", (Curve("rollout/truncated_fraction", "truncated"),), floor=0.0),
)


def _learning(runs: list[Run]) -> tuple[Panel, ...]:
    return (
        discovered_panel("Loss, nats per token", "loss/", runs, str),
        Panel("Teacher gap, nats per token", (Curve("teacher/gap_mean", "gap"),), reference=0.0),
        Panel("Gradient norm before clipping", (Curve("train/grad_norm", "norm"),), floor=0.0),
        Panel("Learning rate", (Curve("train/lr", "lr"),), floor=0.0, smooth=False),
    )


def _results(runs: list[Run]) -> str:
    about = (
        "pass@k is the unbiased estimate 1 - C(n-c,k)/C(n,k) over n samples a problem. Intervals are 95 % bootstrap "
        "intervals over problems; differences resample the same problems on both sides. Bold: the interval excludes 0."
    )
    parts = []
    changes = before_and_after(runs[0])
    if changes:
        columns = ["Benchmark", "Problems × samples", "Metric", "Before", "After", "Difference"]
        parts.append(table(columns, [_change_row(row) for row in changes], numeric_from=3))
    if len(runs) > 1:
        parts.append(_run_table(runs))
    with style():
        plots = [figure(figure_svg(plot, title)) for title, plot in pass_at_k_figures(runs)]
    if plots:
        parts.append(figures(plots))
    body = "".join(parts) or absent("No evaluation: eval.jsonl is missing or empty.")
    if parts and not changes:
        body = absent("Evaluated only once: there is no before and after.") + body
    return section("results", "Results", about, body)


def _change_row(row: Comparison) -> list[str]:
    return [
        escape(row.benchmark),
        f"{row.problems} × {row.samples}",
        f"pass@{row.k}",
        _value(row.before),
        _value(row.after),
        _difference(row.difference),
    ]


def _run_table(runs: list[Run]) -> str:
    """Last evaluation of every run, and its difference from the first run's on the same problems."""
    rows = []
    base = runs[0]
    for benchmark in dict.fromkeys(name for run in runs for name in run.benchmarks):
        for k in base.ks:
            for run in runs:
                history, reference = run.evaluations(benchmark), base.evaluations(benchmark)
                if not history or history[-1].samples < k:
                    continue
                row = comparison(reference[-1] if reference else history[-1], history[-1], k)
                against = "" if run is base or not reference else _difference(row.difference)
                rows.append(
                    [
                        escape(run.name),
                        escape(benchmark),
                        f"pass@{k}",
                        str(history[-1].step),
                        _value(row.after),
                        against,
                    ]
                )
    columns = ["Run", "Benchmark", "Metric", "Step", "Final", f"Difference from {base.name}"]
    return table(columns, rows, numeric_from=3)


def _value(interval: Interval) -> str:
    bounds = f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f'{100 * interval.value:.1f} <span class="interval">{bounds}</span>'


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return '<span class="interval">other problems or samples</span>'
    mark = ("good" if interval.value > 0 else "bad") if interval.excludes_zero else ""
    value, bounds = points(interval).split(" ", 1)
    return f'<span class="{mark}">{value}</span> <span class="interval">{bounds}</span>'


def _panels(anchor: str, title: str, about: str, panels: tuple[Panel, ...], runs: list[Run]) -> str:
    with style():
        drawn = [(panel, panel_figure(panel, runs)) for panel in panels]
        shown = [figure(figure_svg(plot, panel.title)) for panel, plot in drawn if plot is not None]
    missing = [panel.title for panel, plot in drawn if plot is None]
    body = figures(shown) if shown else ""
    if missing:
        body += absent(f"Not recorded: {'; '.join(missing)}.")
    return section(anchor, title, about, body)


def _drift(runs: list[Run]) -> str:
    about = (
        "Drift is log π - log π_old of the sampled tokens, since the rollout; a block's drift is what the gate sees. "
        "Cancellation is mean |block mean| / mean |token drift|: near 0 where drifts of opposite sign hide each other "
        "inside a block. In the maps a grey cell held no token."
    )
    panels = (
        Panel(
            "Mean |drift|, nats",
            (Curve("drift/abs_mean", "tokens"), Curve("drift/block_mean", "blocks")),
        ),
        discovered_panel(
            "Mean block drift by epoch, nats", "drift/block_mean_epoch", runs, lambda epoch: f"epoch {epoch}"
        ),
        Panel("Cancellation", (Curve("drift/cancellation", "blocks / tokens"),), floor=0.0),
    )
    with style():
        plots: list[tuple[str, Figure | None]] = [(panel.title, panel_figure(panel, runs)) for panel in panels]
        plots.append(("Mean block drift by block index", block_index_figure(runs)))
        heat = heatmap_figure(runs)
        shown = [figure(figure_svg(plot, title)) for title, plot in plots if plot is not None]
        if heat is not None:
            shown.append(figure(figure_svg(heat, "Block drift by block index and step"), wide=True))
    body = figures(shown) if shown else ""
    if len(shown) < len(plots):
        body += absent(
            "No drift in metrics.jsonl." if not any(plot for _, plot in plots) else "Not all drifts recorded."
        )
    if heat is None:
        body += absent("No heat map: drift.jsonl is missing or empty.")
    return section("drift", "Drift", about, body)


def _time(runs: list[Run]) -> str:
    panels = (
        Panel("Rollout, tokens per second", (Curve("rollout/tokens_per_s", "rollout"),)),
        Panel("Training, tokens per second", (Curve("train/tokens_per_s", "training"),)),
        Panel("Model FLOPs utilisation", (Curve("train/mfu", "MFU"),)),
        Panel("Seconds per step", (Curve("time/step_s", "step"),), floor=0.0, smooth=False),
    )
    with style():
        breakdown = time_figure(runs)
        plots = [(panel.title, panel_figure(panel, runs)) for panel in panels]
        shown = [figure(figure_svg(plot, title)) for title, plot in plots if plot is not None]
        if breakdown is not None:
            shown.append(figure(figure_svg(breakdown, "Seconds by phase"), wide=True))
    body = figures(shown) if shown else absent("Not recorded: time/*_s and tokens per second.")
    return section("time", "Time", "", body)


def _samples(run: Run) -> str:
    chosen = choose_samples(run.samples)
    if not chosen:
        return section("samples", "Sample responses", "", absent("No samples: samples.jsonl is missing or empty."))
    cards = "".join(map(_sample_card, chosen))
    about = "Rollouts from the start and the end of the run: green was graded right, red wrong."
    return section("samples", "Sample responses", about, f'<div class="samples">{cards}</div>')


def choose_samples(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two from the start of the run and four from its end, right and wrong by turns where both exist."""
    ordered = sorted(samples, key=lambda sample: sample["step"])
    if len(ordered) <= 6:
        return ordered
    late = _by_turns(ordered[-min(8, len(ordered) - 2) :], 4)
    return [*ordered[:2], *sorted(late, key=lambda sample: sample["step"])]


def _by_turns(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The last `count` samples, taken from the right and the wrong ones alternately."""
    right = [sample for sample in reversed(samples) if sample["correct"]]
    wrong = [sample for sample in reversed(samples) if not sample["correct"]]
    turns = sorted([*enumerate(right), *enumerate(wrong)], key=lambda pair: pair[0])
    return [sample for _, sample in turns[:count]]


def _sample_card(sample: dict[str, Any]) -> str:
    mark = "right" if sample["correct"] else "wrong"
    return (
        f'<article class="sample {mark}"><header><span>step {escape(sample["step"])}</span><span>{mark}</span></header>'
        f'<pre class="prompt">{escape(_shorten(sample["prompt"]))}</pre>'
        f"<pre>{escape(_shorten(sample['response']))}</pre></article>"
    )


def _shorten(text: str) -> str:
    more = len(text) - _SAMPLE_CHARACTERS
    return text if more <= 0 else f"{text[:_SAMPLE_CHARACTERS]}\n[{more} characters more]"


def _config(runs: list[Run]) -> str:
    blocks = [_config_block(run) for run in runs if run.config]
    return section("config", "Config", "", "".join(blocks) or absent("No config: config.yaml is missing or empty."))


def _config_block(run: Run) -> str:
    text = yaml.safe_dump(run.config, sort_keys=False)
    return f"<details><summary>{escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
