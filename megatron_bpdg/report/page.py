"""The report: one self-contained HTML page about a run, alone or beside others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_bpdg.report.compare import before_and_after, judge, percent, points
from megatron_bpdg.report.facts import headline, run_facts
from megatron_bpdg.report.health import health, verdict
from megatron_bpdg.report.heatmap import heatmap_figure
from megatron_bpdg.report.plots import (
    Panel,
    block_index_figure,
    discovered_panel,
    panel_figure,
    pass_at_k_figures,
    time_figure,
)
from megatron_bpdg.report.run import Run, load_runs
from megatron_bpdg.report.style import figure_svg, style
from megatron_bpdg.tracking.files import write_text

REPORT_FILE = "report.html"
_SAMPLE_CHARACTERS = 4000


@dataclass(frozen=True)
class Drawing:
    """A figure as inline SVG; `wide` ones take both columns."""

    svg: Markup
    wide: bool


@dataclass(frozen=True)
class Section:
    """A card of figures."""

    anchor: str
    title: str
    about: str
    figures: list[Drawing]


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
    checks = dict.fromkeys(name for by_name in by_check for name in by_name)
    samples = choose_samples(run.samples)
    configs = [(each.name, yaml.safe_dump(each.config, sort_keys=False)) for each in runs if each.config]
    with style():
        curves = [_drawing(title, plot) for title, plot in pass_at_k_figures(runs)]
        sections = [section for section in _sections(runs) if section.figures]
    parts = [
        ("verdict", "Verdict", bool(others)),
        ("health", "Health", any(found)),
        ("results", "Results", bool(run.evals)),
        *((section.anchor, section.title, True) for section in sections),
        ("samples", "Samples", bool(samples)),
        ("config", "Config", bool(configs)),
    ]
    absent = {
        "No evaluation: eval.jsonl is missing or empty.": run.evals,
        "No heat map: drift.jsonl is missing or empty.": run.drift,
        "No samples: samples.jsonl is missing or empty.": samples,
        "No config: config.yaml is missing or empty.": run.config,
    }
    environment = Environment(
        loader=PackageLoader("megatron_bpdg.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"percent": percent, "points": points, "shorten": _shorten}
    return environment.get_template("report.html").render(
        run=run,
        others=others,
        headline=headline(run),
        contents=[(anchor, title) for anchor, title, shown in parts if shown],
        verdicts=[judge(run, other) for other in others],
        one_gated=all(run.gated != other.gated for other in others),
        conditions=[(each.name, verdict(findings)) for each, findings in zip(runs, found)],
        checks={name: [by_name.get(name) for by_name in by_check] for name in checks},
        facts=run_facts(run),
        changes=before_and_after(run),
        curves=curves,
        sections=sections,
        samples=samples,
        configs=configs,
        absent=[line for line, there in absent.items() if not there],
    )


def _sections(runs: list[Run]) -> list[Section]:
    def section(anchor: str, title: str, about: str, panels: Sequence[Panel], **more: Figure | None) -> Section:
        drawn = [_drawing(panel.title, plot) for panel in panels if (plot := panel_figure(panel, runs)) is not None]
        drawn += [_drawing(name.replace("_", " "), plot) for name, plot in more.items() if plot is not None]
        return Section(anchor, title, about, drawn)

    def epoch_label(epoch: str) -> str:
        return f"epoch {epoch}"

    return [
        section(
            "learning",
            "Learning",
            "The teacher gap is the mean of log q - log π on the sampled tokens: it rises towards 0 as the student "
            "becomes the teacher. The gradient norm and the loss are means over the updates of a step.",
            [
                discovered_panel("Loss, nats per token", "loss/", runs, str, floor=None),
                Panel("Teacher gap, nats per token", {"teacher/gap_mean": "gap"}, floor=None, reference=0.0),
                Panel("Gradient norm before clipping", {"train/grad_norm": "norm"}),
                Panel("Learning rate", {"train/lr": "lr"}, smooth=False),
            ],
        ),
        section(
            "gate",
            "Gate",
            "The raw gate is exp(-τ · block drift), before its mean is scaled to 1: at 1 the gate does nothing. The "
            "effective sample size is (Σg)² / (nΣg²) over tokens; at 1 all tokens count alike.",
            [
                Panel(
                    "Gate",
                    {"gate/mean": "mean", "gate/min": "min", "gate/q50": "median"},
                    ("gate/q05", "gate/q95"),
                    ceiling=1.0,
                ),
                Panel("Effective sample size, fraction of tokens", {"gate/ess": "ESS"}, ceiling=1.0),
            ],
        ),
        section(
            "drift",
            "Drift",
            "Drift is log π - log π_old of the sampled tokens, since the rollout; a block's drift is what the gate "
            "sees. Cancellation is mean |block mean| / mean |token drift|: near 0 where drifts of opposite sign hide "
            "each other inside a block. In the maps a grey cell held no token.",
            [
                Panel("Mean |drift|, nats", {"drift/abs_mean": "tokens", "drift/block_mean": "blocks"}),
                discovered_panel("Mean block drift by epoch, nats", "drift/block_mean_epoch", runs, epoch_label),
                Panel("Cancellation", {"drift/cancellation": "blocks / tokens"}),
            ],
            Mean_block_drift_by_block_index=block_index_figure(runs),
            Block_drift_by_block_index_and_step=heatmap_figure(runs),
        ),
        section(
            "mismatch",
            "Sampler against trainer",
            "Log-probs of the same tokens under the same weights, by the sampler and by the trainer. Differences "
            "beyond rounding mean that the two do not sample and train the same distribution.",
            [
                Panel("|log π sampler - log π trainer|, mean, nats", {"mismatch/abs_mean": "mean"}),
                Panel("KL(sampler ‖ trainer), nats per token", {"mismatch/kl": "KL"}),
            ],
        ),
        section(
            "rollouts",
            "Rollouts",
            "What the student sampled for training, before it was updated on it.",
            [
                Panel("Reward, graded fraction right", {"rollout/reward_mean": "reward"}),
                Panel("Student entropy, nats per token", {"actor/entropy": "entropy"}),
                Panel("Response length, tokens", {"rollout/response_tokens_mean": "mean"}),
                Panel("Truncated responses, fraction", {"rollout/truncated_fraction": "truncated"}),
            ],
        ),
        section(
            "time",
            "Time",
            "",
            [
                Panel("Rollout, tokens per second", {"rollout/tokens_per_s": "rollout"}),
                Panel("Training, tokens per second", {"train/tokens_per_s": "training"}),
                Panel("Seconds per step", {"time/step_s": "step"}, smooth=False),
            ],
            Seconds_by_phase=time_figure(runs),
        ),
    ]


def _drawing(title: str, plot: Figure) -> Drawing:
    # The SVG is matplotlib's, which escapes the names inside.
    return Drawing(Markup(figure_svg(plot, title)), wide=plot.get_figwidth() > 6)


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
