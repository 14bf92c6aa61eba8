"""`bpdg serve` without a server: the command it builds, the Python it takes, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from megatron_bpdg.checkpoint.convert import hf_to_megatron
from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.serving.http.process import Command, RunningServer, ServerDied, check_port, signals_interrupt
from megatron_bpdg.serving.sglang import launch
from megatron_bpdg.serving.sglang.launch import EXPORT_RECORD, as_hf, find_python, server_command
from megatron_bpdg.serving.sglang.role import Device, Role
from tests.checkpoint_fixtures import save_tiny_qwen3

CONSOLE = Console(stderr=True)


def model(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "qwen3", "vocab_size": 151_936, "dtype": "bfloat16"} | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def command(folder: Path, role: Role = Role.STUDENT, device: Device = Device.CUDA, **options: Any) -> Any:
    return server_command(folder, role, python="py", device=device, **options)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the caller, which would win."""
    for name in [name for name in os.environ if name.startswith(("SGLANG_", "HF_", "OMP_"))]:
        monkeypatch.delenv(name)


def flag(argv: tuple[str, ...], name: str) -> str:
    assert argv.count(name) == 1
    return argv[argv.index(name) + 1]


def test_command_of_a_gpu_server(tmp_path: Path) -> None:
    made = command(model(tmp_path / "m"), host="0.0.0.0", port=1234, tp=4, context_length=4096)
    assert made.argv[:3] == ("py", "-m", "sglang.launch_server")
    for name, value in {
        "--model-path": str(tmp_path / "m"),
        "--host": "0.0.0.0",
        "--port": "1234",
        "--tp-size": "4",
        "--dtype": "bfloat16",
        "--context-length": "4096",
        "--device": "cuda",
    }.items():
        assert flag(made.argv, name) == value
    assert "--skip-server-warmup" not in made.argv
    assert made.env == {"HF_HUB_OFFLINE": "1"}
    assert (made.host, made.port, made.vocab_size) == ("0.0.0.0", 1234, 151_936)


def test_a_cpu_server_is_told_to_be_modest(tmp_path: Path) -> None:
    made = command(model(tmp_path / "m"), device=Device.CPU)
    assert flag(made.argv, "--attention-backend") == "torch_native"
    assert "--sleep-on-idle" in made.argv
    assert made.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert made.env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("vocab", "rows"), [(151_936, 1766), (64, 2048)])
def test_a_teacher_keeps_a_gigabyte_of_logits_at_a_time(tmp_path: Path, vocab: int, rows: int) -> None:
    env = command(model(tmp_path / "m", vocab_size=vocab), Role.TEACHER).env
    assert env["SGLANG_ENABLE_LOGPROB_CHUNK"] == "1"
    assert env["SGLANG_LOGPROB_CHUNK_SIZE"] == str(rows)
    assert rows * vocab * 4 <= 2**30


def test_flags_and_variables_of_the_user_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    extra = ["--mem-fraction-static", "0.8", "--sleep-on-idle"]
    made = command(model(tmp_path / "m"), device=Device.CPU, extra=extra)
    assert flag(made.argv, "--mem-fraction-static") == "0.8"
    assert made.argv.count("--sleep-on-idle") == 1
    assert made.env["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize("extra", [["--api-key", "secret"], ["--api-key=secret"]])
def test_the_api_key_is_known_to_the_health_check(tmp_path: Path, extra: list[str]) -> None:
    assert command(model(tmp_path / "m"), extra=extra).api_key == "secret"
    assert command(model(tmp_path / "m")).api_key is None


@pytest.mark.parametrize("extra", [["--api-key", "secret"], ["--api-key=secret"]])
def test_the_api_key_is_not_printed(tmp_path: Path, extra: list[str]) -> None:
    made = command(model(tmp_path / "m"), extra=[*extra, "--log-level", "info"])
    assert "secret" not in str(made)
    assert "--api-key" in str(made)
    assert str(made).endswith("--log-level info")


def test_the_printed_command_can_be_pasted(tmp_path: Path) -> None:
    text = str(command(model(tmp_path / "with space")))
    assert text.startswith("env HF_HUB_OFFLINE=1 py -m sglang.launch_server --model-path '")


def test_the_config_of_a_model_with_images_holds_its_text_model(tmp_path: Path) -> None:
    fields = {"vocab_size": None, "dtype": None, "text_config": {"vocab_size": 100, "dtype": "float16"}}
    made = command(model(tmp_path / "m", **fields))
    assert (made.vocab_size, flag(made.argv, "--dtype")) == (100, "float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "auto"}, "--dtype 'auto' is not known; choose float32, bfloat16, float16"),
        ({"extra": ["--port=1"]}, "--port=1 after `--`: bpdg serve has --port for it"),
        ({"extra": ["--tp-size", "2"]}, "bpdg serve has --tp for it"),
        ({"extra": ["oops"]}, "'oops' is no flag of SGLang"),
    ],
)
def test_refused_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(model(tmp_path / "m"), **options)


def test_refused_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json not found: expected an HF model directory"):
        command(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no model's config"):
        command(tmp_path)
    with pytest.raises(ValueError, match="names no dtype; pass --dtype, one of float32"):
        command(model(tmp_path / "m", dtype=None))
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        command(tmp_path / "m", dtype="float32")


def test_the_python_of_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(launch, "_sglang_version", lambda python: None)
    with pytest.raises(ValueError, match=r"this Python .* has no sglang; name one that has, with --python or"):
        find_python(None)
    with pytest.raises(ValueError, match=r"--python: .* is no program"):
        find_python(tmp_path)
    monkeypatch.setenv(launch.PYTHON_VARIABLE, sys.executable)
    with pytest.raises(ValueError, match=f"{launch.PYTHON_VARIABLE}: .* has no sglang. tools/install_sglang_cpu.sh"):
        find_python(None)
    monkeypatch.setattr(launch, "_sglang_version", lambda python: "0.5.9")
    with pytest.raises(ValueError, match=r"has sglang 0\.5\.9; 0\.5\.23 or newer is needed"):
        find_python(None)
    monkeypatch.setattr(launch, "_sglang_version", lambda python: "0.5.30.post1")
    assert find_python(None) == sys.executable


def test_a_megatron_checkpoint_is_exported_once(tmp_path: Path) -> None:
    save_tiny_qwen3(tmp_path / "hf", tied=True)
    hf_to_megatron(tmp_path / "hf", tmp_path / "run" / "checkpoints")
    export = as_hf(tmp_path / "run" / "checkpoints", None, CONSOLE)
    assert export.parent == tmp_path / "run"
    assert sorted(HFCheckpoint(export).shapes) == sorted(HFCheckpoint(tmp_path / "hf").shapes)
    written = (export / "config.json").stat().st_mtime_ns
    assert as_hf(tmp_path / "run" / "checkpoints", None, CONSOLE) == export
    assert (export / "config.json").stat().st_mtime_ns == written, "exported twice"
    (export / EXPORT_RECORD).write_text("[]")  # as if the checkpoint had been written again
    as_hf(tmp_path / "run" / "checkpoints", None, CONSOLE)
    assert (export / "config.json").stat().st_mtime_ns > written


def test_checkpoints_that_cannot_be_exported(tmp_path: Path) -> None:
    save_tiny_qwen3(tmp_path / "hf", tied=True)
    assert as_hf(tmp_path / "hf", None, CONSOLE) == tmp_path / "hf"
    with pytest.raises(ValueError, match="--export is for Megatron checkpoints"):
        as_hf(tmp_path / "hf", tmp_path / "export", CONSOLE)
    with pytest.raises(FileNotFoundError, match="expected an HF directory or a Megatron checkpoint"):
        as_hf(tmp_path / "nothing", None, CONSOLE)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(FileExistsError, match="is no export of `bpdg serve`; delete it"):
        as_hf(tmp_path / "megatron", tmp_path / "hf", CONSOLE)


SERVER = """
import http.server, subprocess, sys
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("leader", ["told to stop", "dead already"])
def test_a_stopped_server_leaves_no_process_and_the_machine_is_not_searched_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leader: str
) -> None:
    searched: list[int] = []
    every = psutil.process_iter
    monkeypatch.setattr(psutil, "process_iter", lambda: (searched.append(1), every())[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Command((sys.executable, "-c", SERVER, str(port)), {}, "127.0.0.1", port)
    # Long enough for many looks at the child that does not hear.
    server = RunningServer(command, tmp_path / "log", grace_s=1.0)
    server.start()
    child = psutil.Process(int((tmp_path / "log").read_text()))
    assert child.is_running()
    if leader == "dead already":
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerDied, match="ended by SIGKILL"):
            server.wait()
    server.stop()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert len(searched) == 2


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} of --host 127.0.0.1: Address already in use"):
            check_port("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"--host 192\.0\.2\.1: Cannot assign requested address"):
        check_port("192.0.2.1", port)


@pytest.fixture
def default_signals() -> Iterator[None]:
    """The signals as a shell hands them over; under nohup this process ignores SIGHUP from its start."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_end_are_as_good_as_ctrl_c(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=number.name), signals_interrupt():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("default_signals")
def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_interrupt():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
