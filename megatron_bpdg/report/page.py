"""The report: one self-contained HTML page about a run, alone or beside others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_bpdg.report.compare import before_and_after, judge
from megatron_bpdg.report.facts import headline, run_facts
from megatron_bpdg.report.health import health, verdict
from megatron_bpdg.report.heatmap import heatmap_figure
from megatron_bpdg.report.plots import Panel, block_index_figure, panel_figure, pass_at_k_figures, time_figure
from megatron_bpdg.report.run import Run, load_runs
from megatron_bpdg.report.style import figure_svg, style
from megatron_bpdg.tracking.files import write_text

REPORT_FILE = "report.html"
_SAMPLE_CHARACTERS = 4000


# By card of the page, whose titles and words stand in the template.
_PANELS = {
    "learning": [
        Panel("Loss, nats per token", {"loss/*": "{}"}, floor=None),
        Panel("Teacher gap, nats per token", {"teacher/gap_mean": "gap"}, floor=None, reference=0.0),
        Panel("Gradient norm before clipping", {"train/grad_norm": "norm"}),
        Panel("Learning rate", {"train/lr": "lr"}, smooth=False),
    ],
    "gate": [
        Panel(
            "Gate",
            {"gate/mean": "mean", "gate/min": "min", "gate/q50": "median"},
            ("gate/q05", "gate/q95"),
            ceiling=1.0,
        ),
        Panel("Effective sample size, fraction of tokens", {"gate/ess": "ESS"}, ceiling=1.0),
    ],
    "drift": [
        Panel("Mean |drift|, nats", {"drift/abs_mean": "tokens", "drift/block_mean": "blocks"}),
        Panel("Mean block drift by epoch, nats", {"drift/block_mean_epoch*": "epoch {}"}),
        Panel("Cancellation", {"drift/cancellation": "blocks / tokens"}),
    ],
    "mismatch": [
        Panel("|log π sampler - log π trainer|, mean, nats", {"mismatch/abs_mean": "mean"}),
        Panel("KL(sampler ‖ trainer), nats per token", {"mismatch/kl": "KL"}),
    ],
    "rollouts": [
        Panel("Reward, graded fraction right", {"rollout/reward_mean": "reward"}),
        Panel("Student entropy, nats per token", {"actor/entropy": "entropy"}),
        Panel("Response length, tokens", {"rollout/response_tokens_mean": "mean"}),
        Panel("Truncated responses, fraction", {"rollout/truncated_fraction": "truncated"}),
    ],
    "time": [
        Panel("Rollout, tokens per second", {"rollout/tokens_per_s": "rollout"}),
        Panel("Training, tokens per second", {"train/tokens_per_s": "training"}),
        Panel("Seconds per step", {"time/step_s": "step"}, smooth=False),
    ],
}


def write_report(run_dir: Path, compare: Sequence[Path] = ()) -> Path:
    """Write `run_dir/report.html` and return its path.

    Args:
        run_dir: a run's directory: config.yaml, metrics.jsonl, drift.jsonl, eval.jsonl, samples.jsonl; any may be
            missing, the page then says so.
        compare: directories of further runs to draw into the same figures.

    Raises:
        FileNotFoundError: a directory holds no run.
        ValueError: a damaged file, or the same run given twice.
    """
    write_text(run_dir / REPORT_FILE, render(load_runs(run_dir, list(compare))))
    return run_dir / REPORT_FILE


def render(runs: list[Run]) -> str:
    """The page's markup for the first run, with the others drawn beside it. What has no data is left out."""
    run, others = runs[0], runs[1:]
    found = [health(each) for each in runs]
    by_check = [{finding.check: finding for finding in findings} for findings in found]
    environment = Environment(
        loader=PackageLoader("megatron_bpdg.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"shorten": _shorten, "svg": figure_svg}
    with style():
        figures = {
            card: [(panel.title, figure) for panel in panels if (figure := panel_figure(panel, runs)) is not None]
            for card, panels in _PANELS.items()
        }
        for card, title, figure in (
            ("drift", "Mean block drift by block index", block_index_figure(runs)),
            ("drift", "Block drift by block index and step", heatmap_figure(runs)),
            ("time", "Seconds by phase", time_figure(runs)),
        ):
            if figure is not None:
                figures[card].append((title, figure))
        return environment.get_template("report.html").render(
            run=run,
            others=others,
            headline=headline(run),
            verdicts=[judge(run, other) for other in others],
            one_gated=all(run.gated != other.gated for other in others),
            conditions=[(each.name, verdict(findings)) for each, findings in zip(runs, found)],
            checks={
                name: [findings.get(name) for findings in by_check]
                for name in dict.fromkeys(name for findings in by_check for name in findings)
            },
            facts=run_facts(run),
            changes=before_and_after(run),
            curves=pass_at_k_figures(runs),
            figures=figures,
            samples=choose_samples(run.samples),
            configs=[(each.name, yaml.safe_dump(each.config, sort_keys=False)) for each in runs if each.config],
        )


def choose_samples(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two from the start of the run and four from its end, right and wrong by turns where both exist."""
    ordered = sorted(samples, key=lambda sample: sample["step"])
    if len(ordered) <= 6:
        return ordered
    late = ordered[: -min(8, len(ordered) - 2) - 1 : -1]
    right = [sample for sample in late if sample["correct"]]
    wrong = [sample for sample in late if not sample["correct"]]
    turns = sorted([*enumerate(right), *enumerate(wrong)], key=lambda pair: pair[0])
    return [*ordered[:2], *sorted([sample for _, sample in turns[:4]], key=lambda sample: sample["step"])]


def _shorten(text: str) -> str:
    more = len(text) - _SAMPLE_CHARACTERS
    return text if more <= 0 else f"{text[:_SAMPLE_CHARACTERS]}\n[{more} characters more]"
