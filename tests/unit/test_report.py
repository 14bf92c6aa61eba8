import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.report.heatmap import drift_matrix
from megatron_bpdg.report.html import choose_samples, write_report
from megatron_bpdg.report.passk import before_and_after, difference, estimate, summary_rows
from megatron_bpdg.report.plots import running_mean
from megatron_bpdg.report.run import Run, load_runs
from megatron_bpdg.report.style import legend_rows, number
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
    assert len(svgs) == 2 + 4 + 2 + 4 + 1 + 2 + 4 + 3
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
    assert "Not recorded" not in page
    assert 'class="absent"' not in page
    assert "&lt;b&gt;7&lt;/b&gt;" in page
    assert "<b>" not in page
    assert not list(run_dir.glob(".*.tmp"))


def test_report_is_deterministic(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_comparison_overlays_runs(run_dir: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "ungated", steps=20, lift=0.3, seed=1)
    page = write_report(run_dir, [tmp_path / "ungated"]).read_text()
    check_page(page)
    assert "compared with ungated" in page
    assert "Difference from gated" in page
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
        "Not recorded: Gate; Effective sample size, fraction of tokens.",
    ):
        assert line in page, line


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


def record(step: int, correct: list[int], samples: int = 4, first_id: int = 0) -> EvalResult:
    ids = [f"p{first_id + index}" for index in range(len(correct))]
    return EvalResult("bench", step, samples, ids, correct, 0.0, 10.0)


def run_with(evals: list[EvalResult], config: dict[str, object] | None = None) -> Run:
    return Run("run", Path("run"), config or {}, [], [], evals, [])


def test_pass_at_k_and_its_interval() -> None:
    result = estimate(record(0, [0, 4, 2, 2]), k=1)
    assert result.value == pytest.approx(0.5)
    assert result.low < 0.5 < result.high
    # k = 2 of n = 4: 1 - C(2,2)/C(4,2) = 5/6 where two are right.
    assert estimate(record(0, [0, 4, 2, 2]), k=2).value == pytest.approx((0 + 1 + 5 / 6 + 5 / 6) / 4)


def test_difference_is_paired_by_problem_id() -> None:
    before = record(0, [0, 1, 2, 3])
    shuffled = EvalResult("bench", 9, 4, ["p3", "p2", "p1", "p0"], [4, 3, 2, 1], 0.0, 10.0)
    result = difference(before, shuffled, k=1)
    assert result is not None
    # Every problem gained exactly one of four: paired resampling sees no variance at all.
    assert (result.value, result.low, result.high) == pytest.approx((0.25, 0.25, 0.25))
    assert result.excludes_zero
    assert difference(before, record(9, [1, 1, 1, 1], first_id=1), k=1) is None
    assert difference(before, record(9, [1, 1, 1, 1], samples=8), k=1) is None


def test_before_and_after_use_first_and_last_step() -> None:
    run = run_with([record(50, [4] * 4), record(0, [0] * 4), record(25, [2] * 4)], {"evaluation": {"k": [1, 4, 8]}})
    rows = before_and_after(run)
    assert [(row.k, row.before.value, row.after.value) for row in rows] == [(1, 0.0, 1.0), (4, 0.0, 1.0)]
    assert summary_rows(run)[0]["difference, 95 % interval"] == "+100.0 [+100.0, +100.0]"
    assert before_and_after(run_with([record(0, [1])])) == []
    assert run_with([record(0, [1])]).ks == [1, 4]


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
