import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bpdg.tracking.metrics import MetricsLogger, read_jsonl, read_metrics
from megatron_bpdg.tracking.progress import TrainingProgress, format_seconds
from megatron_bpdg.tracking.tables import summary_table


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_lines_are_flushed_and_carry_plain_numbers(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False, wandb=None, config={}) as logger:
        logger.log(3, {"loss/opd": torch.tensor(0.5), "train/updates": 8})
        (record,) = lines(tmp_path / "metrics.jsonl")
    assert record.pop("time") > 1e9
    assert record == {"step": 3, "loss/opd": 0.5, "train/updates": 8.0}


def test_nonfinite_becomes_null_with_its_name(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False, wandb=None, config={}) as logger:
        logger.log(1, {"b": math.inf, "a": math.nan, "c": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    record = json.loads(text)
    assert (record["a"], record["b"], record["c"], record["nonfinite"]) == (None, None, 1.0, ["a", "b"])


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with (
        MetricsLogger(tmp_path, tensorboard=False, wandb=None, config={}) as logger,
        pytest.raises(ValueError, match="'step'"),
    ):
        logger.log(1, {"step": 1.0})


def test_read_merges_steps_and_later_values_win(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False, wandb=None, config={}) as logger:
        logger.log(2, {"x": math.nan, "z": math.nan})
        logger.log(1, {"x": 1.0})
        logger.log(2, {"x": 3.0, "y": 4.0})
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["x"], first["nonfinite"]) == (1, 1.0, [])
    assert (second["step"], second["x"], second["y"], second["z"]) == (2, 3.0, 4.0, None)
    assert second["nonfinite"] == ["z"]
    assert read_metrics(tmp_path / "missing") == []


def test_cut_off_last_line_is_left_out_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0, "x": 1.0}\n{"step": 2, "ti')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\noops\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        list(read_jsonl(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not a JSON object"):
        list(read_jsonl(path))


def test_drift_is_a_line_per_update(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=False, wandb=None, config={}) as logger:
        logger.log_drift(1, 0, 2, [0.1, math.nan], [5, 0])
        logger.log_drift(1, 1, 2, [0.2], [5])
    first, second = lines(tmp_path / "drift.jsonl")
    assert first == {
        "step": 1,
        "update": 0,
        "epoch": 2,
        "abs_drift_by_block": [0.1, None],
        "tokens_by_block": [5, 0],
    }
    assert second["update"] == 1


def test_drift_lengths_must_agree(tmp_path: Path) -> None:
    with (
        MetricsLogger(tmp_path, tensorboard=False, wandb=None, config={}) as logger,
        pytest.raises(ValueError, match="has 1 blocks, tokens_by_block 2"),
    ):
        logger.log_drift(1, 0, 0, [0.1], [1, 2])


def test_tensorboard_gets_the_finite_scalars(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, tensorboard=True, wandb=None, config={"seed": 1}) as logger:
        logger.log(1, {"loss/opd": 2.0, "bad": math.nan})
        logger.log(2, {"loss/opd": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss/opd"]
    assert [(event.step, event.value) for event in events.Scalars("loss/opd")] == [(1, 2.0), (2, 1.0)]


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"megatron-bpdg\[wandb\]"):
        MetricsLogger(tmp_path / "run", tensorboard=False, wandb="project", config={})
    assert not (tmp_path / "run").exists()


def test_wandb_gets_metrics_and_the_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    class FakeRun:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", (step, values)))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    class FakeWandb:
        @staticmethod
        def init(**arguments: object) -> FakeRun:
            calls.append(("init", (arguments["project"], arguments["name"])))
            return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    logger = MetricsLogger(tmp_path / "run", tensorboard=False, wandb="project", config={})

    def log_and_stop() -> None:
        with logger:
            logger.log(1, {"x": 1.0, "bad": math.nan})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log_and_stop()
    assert calls == [("init", ("project", "run")), ("log", (1, {"x": 1.0})), ("finish", 1)]


def test_progress_prints_plain_lines_without_a_tty(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(4, "demo") as progress:
        progress.status("not yet time for a line")
        for step in range(1, 5):
            progress.update(step, {"loss": 0.12345})
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("demo: step 1/4  ")
    assert last.startswith("demo: step 4/4  ")
    assert "ETA 0:00" in last
    assert last.endswith("loss 0.1235")


def test_progress_measures_its_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(20, "demo") as progress:
        progress._started -= 20.0
        progress.status("10/16 responses")
        progress._last_line -= 20.0
        progress.update(10, {})
    assert capsys.readouterr().err == "demo: 10/16 responses\ndemo: step 10/20  2.00 s/step  ETA 0:20\n"


def test_progress_on_a_terminal_shows_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with TrainingProgress(2, "demo") as progress:
        progress.update(1, {"gate": 0.9})
        progress.note("[1] literal")
    shown = capsys.readouterr().err
    assert "1/2" in shown
    assert "gate 0.9" in shown
    assert "[1] literal" in shown


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (125, "2:05"), (3723, "1:02:03")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_summary_table_has_a_column_per_key() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table([{"metric": "pass@1", "before": 0.123456}, {"metric": "pass@8", "after": 2}], "Done"))
    text = console.file.getvalue()
    for part in ("Done", "metric", "before", "after", "pass@8", "0.1235"):
        assert part in text
