import html
import json
import math
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_bpdg.cli.app import app
from megatron_bpdg.report.heatmap import drift_matrix
from megatron_bpdg.report.page import choose_samples, render, write_report
from megatron_bpdg.report.plots import Panel, block_index_figure, panel_figure, running_mean
from megatron_bpdg.report.run import Run, load_runs
from megatron_bpdg.report.style import PALETTE, legend_rows, number
from tests.report_fixtures import write_run


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order, and collects ids."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> list[str]:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for svg in svgs:
        tree = ElementTree.fromstring(svg)
        ids = {element.get("id") for element in tree.iter()} - {None}
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= ids
    # Self-contained: nothing is fetched from anywhere.
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert not re.findall(r"url\((?!#)|@import", page)
    assert set(re.findall(r"https?://[^/]+", page)) <= {"http://www.w3.org"}
    return svgs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "gated"
    write_run(directory, steps=80)
    return directory


def test_report_is_complete_and_self_contained(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = path.read_text()
    svgs = check_page(page)
    assert len(svgs) == 2 + 4 + 2 + 4 + 1 + 2 + 4 + 3  # tokens/s of training and FLOPs are not recorded: no panel
    for text in (
        "0.22 M parameters",
        "newline spans",
        "TP2 × PP1 × CP1 × DP1, sequence parallel",
        "80 of 100",
        "lr: 0.001",
    ):
        assert text in page, text
    for title in ("Gate", "Mean block drift by epoch, nats", "Block drift, epoch 1", "arithmetic: pass@8, %"):
        assert f">{title}</text>" in page, title
    assert "Training, tokens per second" not in page
    assert 'class="absent"' not in page
    assert "&lt;b&gt;7&lt;/b&gt;" in page
    assert "<b>" not in page
    assert not list(run_dir.glob(".*.tmp"))


def test_report_is_deterministic(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_comparison_overlays_runs(run_dir: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "ungated", steps=20, lift=0.3, seed=1, gated=False)
    page = write_report(run_dir, [tmp_path / "ungated"]).read_text()
    check_page(page)
    assert "compared with ungated" in page
    assert "gated minus ungated is" in page
    assert "the runs differ in seed" in page
    assert ">ungated, epoch 1</text>" in page
    assert page.count(">ungated</text>") > 10


def test_absent_parts_say_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "loss/sft": 2.0}\n')
    page = write_report(tmp_path).read_text()
    assert len(check_page(page)) == 1
    for line in (
        "No evaluation: eval.jsonl",
        "No heat map: drift.jsonl",
        "No samples: samples.jsonl",
        "No config: config.yaml",
    ):
        assert line in page, line
    # What has no data has neither a card nor a link.
    assert re.findall(r'id="([a-z]+)"><h2', page) == re.findall(r'<a href="#(.*?)"', page) == ["health", "learning"]
    assert "Gate" not in page


def test_nonfinite_values_and_empty_responses_are_announced(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "time": 1.0, "loss/opd": 1.0, "rollout/empty": 3.0},
        {"step": 2, "time": 2.0, "loss/opd": None, "nonfinite": ["loss/opd"]},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "loss/opd was not finite at 1 step (2)" in page
    assert ">not finite</text>" in page
    assert "3 empty responses were dropped, over 1 steps" in page


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run"):
        write_report(tmp_path)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for variant in ("a", "b"):
        (tmp_path / variant / "seed0").mkdir(parents=True)
        (tmp_path / variant / "seed0" / "config.yaml").write_text("seed: 0\n")
    runs = load_runs(tmp_path / "a" / "seed0", [tmp_path / "b" / "seed0"])
    assert [run.name for run in runs] == ["a/seed0", "b/seed0"]
    with pytest.raises(ValueError, match="given twice"):
        load_runs(tmp_path / "a" / "seed0", [tmp_path / "a" / "seed0"])


def test_drift_matrix_weights_updates_by_tokens_and_keeps_gaps() -> None:
    rows = [
        {"step": 2, "epoch": 0, "abs_drift_by_block": [0.1, 0.4], "tokens_by_block": [10, 10]},
        {"step": 2, "epoch": 0, "abs_drift_by_block": [0.4], "tokens_by_block": [20]},
        {"step": 4, "epoch": 0, "abs_drift_by_block": [1.0, None], "tokens_by_block": [5, 7]},
        {"step": 8, "epoch": 0, "abs_drift_by_block": [2.0, 9.0], "tokens_by_block": [5, 0]},
        {"step": 8, "epoch": 1, "abs_drift_by_block": [7.0], "tokens_by_block": [5]},
    ]
    run = Run("run", Path("run"), {}, [], rows, [], [])
    steps, drift_BS, tokens_BS = drift_matrix(run, epoch=0)
    assert steps.tolist() == [2, 4, 6, 8]
    np.testing.assert_allclose(drift_BS, [[0.3, 1.0, math.nan, 2.0], [0.4, math.nan, math.nan, math.nan]])
    np.testing.assert_allclose(tokens_BS, [[30, 5, 0, 5], [10, 0, 0, 0]])


def test_running_mean_keeps_lines_and_skips_gaps() -> None:
    line = np.arange(100.0)
    np.testing.assert_allclose(running_mean(line), line)
    values = np.ones(50)
    values[20] = math.nan
    np.testing.assert_allclose(running_mean(values), np.ones(50))


def test_samples_mix_right_and_wrong() -> None:
    samples = [{"step": step, "correct": step % 5 == 0, "index": i} for step in range(1, 21) for i in range(2)]
    chosen = choose_samples(samples)
    assert [sample["step"] for sample in chosen[:2]] == [1, 1]
    assert sorted(sample["correct"] for sample in chosen[2:]) == [False, False, True, True]
    assert choose_samples(samples[:3]) == samples[:3]


def test_tick_labels_and_legend_rows() -> None:
    assert [number(value) for value in (0.0, 0.25, 9500.0, 2.2e-6, -3e7)] == ["0", "0.25", "9500", "2.2e-6", "-3e7"]
    assert legend_rows(["only"], 5.0) == (0, 0)
    assert legend_rows(["a", "b"], 5.0) == (1, 2)
    rows, columns = legend_rows(["a long name of a run " * 2] * 3, 5.0)
    assert (rows, columns) == (3, 1)


HAND_CONFIG = {"kind": "opd", "seed": 7, "gate": {"tau": 1.0}, "training": {"steps": 10}, "evaluation": {"k": [1, 2]}}


def write_hand_run(directory: Path, gated: bool, correct: list[int]) -> None:
    """Two problems of four samples, none right before training; two steps."""
    directory.mkdir()
    (directory / "config.yaml").write_text(json.dumps({**HAND_CONFIG, "gate": HAND_CONFIG["gate"] if gated else None}))
    rows = [
        {"step": 0, "time": 100.0, "model/student_parameters": 1.5e6},
        {"step": 5, "time": 150.0, "gate/ess": 0.95, "time/rollout_s": 4.0, "time/update_s": 1.0, "time/step_s": 5.0},
        {"step": 10, "time": 225.0, "gate/ess": 0.97, "time/rollout_s": 2.0, "time/update_s": 1.0, "time/step_s": 5.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (directory / "eval.jsonl").open("w") as stream:
        for step, right in ((0, [0, 0]), (10, correct)):
            truncation = {"truncated_fraction": 0.0, "mean_response_tokens": 9.0}
            result = {"benchmark": "bench", "step": step, "samples": 4, "problem_ids": ["p", "q"], "correct": right}
            stream.write(json.dumps(result | truncation) + "\n")


@pytest.fixture
def hand_runs(tmp_path: Path) -> tuple[Path, Path]:
    write_hand_run(tmp_path / "with", gated=True, correct=[2, 4])
    write_hand_run(tmp_path / "without", gated=False, correct=[1, 3])
    return tmp_path / "with", tmp_path / "without"


# pass@1 of [2, 4] of 4 is the mean of 1/2 and 1, of [1, 3] that of 1/4 and 3/4. pass@2 = 1 - C(4-c, 2) / 6: 5/6 and 1,
# 1/2 and 1. Of two problems a resample holds the lower twice, both, or the higher twice with chances 1/4, 1/2, 1/4: the
# interval runs from one problem's value to the other's.
HAND_ROWS = {
    "with": ["75.0 [50.0, 100.0] +75.0 [+50.0, +100.0]", "91.7 [83.3, 100.0] +91.7 [+83.3, +100.0]"],
    "without": ["50.0 [25.0, 75.0] +50.0 [+25.0, +75.0]", "75.0 [50.0, 100.0] +75.0 [+50.0, +100.0]"],
    "between": [
        "50.0 [25.0, 75.0] 75.0 [50.0, 100.0] +25.0 [+25.0, +25.0]",
        "75.0 [50.0, 100.0] 91.7 [83.3, 100.0] +16.7 [+0.0, +33.3]",
    ],
}
HAND_SENTENCE = (
    "The gate helped: with minus without is +25.0 [+25.0, +25.0] points of pass@1 on bench, "
    "+16.7 [+0.0, +33.3] points of pass@2 on bench."
)


def words(markup: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", markup).split())


def test_every_number_of_the_page(hand_runs: tuple[Path, Path]) -> None:
    run, other = hand_runs
    page = write_report(run, [other]).read_text()
    text = words(page)
    assert HAND_SENTENCE in text
    assert "over the 2 problems of two single runs at step 10, one seed each (7 and 7)" in text
    for k in (1, 2):
        assert f"bench 2 × 4 pass@{k} 0.0 [0.0, 0.0] {HAND_ROWS['with'][k - 1]}" in text
        assert f"bench 2 × 4 pass@{k} {HAND_ROWS['between'][k - 1]}" in text
    assert "with : healthy in 3 checks without : healthy in 2 checks" in text
    assert "gate acts yes lowest effective sample size 0.95" in text
    assert "yes bench pass@1 +75.0 [+50.0, +100.0]; bench pass@2 +91.7 [+83.3, +100.0]" in text
    assert "Seed 7 Steps 10 of 10 Wall time 2:05" in text
    alone = write_report(run).read_text()
    (curve,) = [svg for svg in check_page(alone) if 'aria-label="bench: pass@1, %"' in svg]
    assert {"0.0", "75.0"} <= set(re.findall(r">([\d.]+)</text>", curve))
    # 6 of 10 seconds were rollouts, 2 updates; the phases leave 2 unexplained.
    for share in ("rollout 60%", "update 20%", "other 20%"):
        assert f">{share}</text>" in alone
    assert 'id="verdict"' not in alone


def test_every_number_of_the_terminal(hand_runs: tuple[Path, Path]) -> None:
    arguments = ["report", str(hand_runs[1]), "--compare", str(hand_runs[0])]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert (hand_runs[1] / "report.html").is_file()
    text = " ".join(result.stdout.replace("│", " ").split())
    for name in ("with", "without"):
        for k in (1, 2):
            value, change = (part.split(" [")[0] for part in HAND_ROWS[name][k - 1].split("] ", 1))
            bounds = HAND_ROWS[name][k - 1].split("[")[-1]
            assert f"{name} bench pass@{k} 0.0 {value} {change} [{bounds}" in text
    # The run without a gate is subtracted, whichever of the two the report is about.
    assert "with minus without, last evaluations" in text
    assert "bench pass@1 50.0 75.0 +25.0 [+25.0, +25.0] bench pass@2 75.0 91.7 +16.7 [+0.0, +33.3]" in text
    assert HAND_SENTENCE in text
    assert text.endswith("without: healthy in 2 checks with: healthy in 3 checks")


def test_curves_are_the_recorded_numbers_on_honest_axes(hand_runs: tuple[Path, Path]) -> None:
    (run,) = load_runs(hand_runs[0], [])
    figure = panel_figure(Panel("ESS", {"gate/ess": "ESS"}, ceiling=1.0), [run])
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([5, 10], [0.95, 0.97])
    assert figure.axes[0].get_ylim() == pytest.approx((0.0, 1.02))
    assert panel_figure(Panel("absent", {"train/tokens_per_s": "training"}), [run]) is None


def test_block_index_curve_weighs_steps_by_tokens() -> None:
    rows = [
        {"step": 1, "epoch": 0, "abs_drift_by_block": [0.1, 0.4], "tokens_by_block": [10, 10]},
        {"step": 2, "epoch": 0, "abs_drift_by_block": [0.4], "tokens_by_block": [20]},
    ]
    figure = block_index_figure([Run("run", Path("run"), {}, [], rows, [], [])])
    assert figure is not None
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.3, 0.4])


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    name, config = "<i>&'run'", {"objective": {"name": "<u>lsm</u>"}, "gate": {"partition": {"name": "<u>"}}}
    evaluation = '{"benchmark": "<s>b</s>", "step": %d, "samples": 1, "problem_ids": ["p"], "correct": [1], '
    for directory in (tmp_path / name, tmp_path / "<em>"):
        directory.mkdir()
        (directory / "config.yaml").write_text(json.dumps(config))
        metrics = {"step": 1, "time": 1.0, "loss/<s>": None, "nonfinite": ["loss/<s>"]}
        (directory / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        lines = [evaluation % step + '"truncated_fraction": 0.0, "mean_response_tokens": 1.0}\n' for step in (0, 1)]
        (directory / "eval.jsonl").write_text("".join(lines))
    page = render(load_runs(tmp_path / name, [tmp_path / "<em>"]))
    check_page(page)
    assert not re.findall(r"<(?:i|u|s|em)\b", page)
    for text in ("<i>&'run'", "<em>", "<s>b</s>", "<u>lsm</u>", "loss/<s> was not finite"):
        assert html.escape(text).replace("&#x27;", "&#39;") in page, text


def test_colours_of_figures_follow_the_page(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    assert "prefers-color-scheme: dark" in page
    # A colour that were not a variable would stay what it is on a dark page.
    literal = set(re.findall(r": (#\w{6})\b", "".join(check_page(page))))
    assert not literal & set(PALETTE)
    assert literal <= {"#ffffff", "#fde725"}  # edges of the colour bar
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL))
    assert used <= light == dark


def test_templates_are_package_data() -> None:
    root = Path(__file__).parents[2]
    package_data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for name in package_data["megatron_bpdg"] for path in (root / "megatron_bpdg").glob(name)}
    assert {"report.html", "style.css"} <= {path.name for path in packaged}
