"""`bpdg serve` and `bpdg doctor` as users start them, on a real server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from megatron_bpdg.data.arithmetic import ALPHABET
from megatron_bpdg.data.char_tokenizer import build_char_tokenizer
from megatron_bpdg.serving.http.client import Server
from megatron_bpdg.serving.http.ready import healthy, wait_until_ready
from megatron_bpdg.serving.sglang.launch import server_command
from megatron_bpdg.serving.sglang.role import Device, Role
from tests.integration.miniature import VOCAB, Miniature, write_shape
from tests.serving.conftest import DEADLINE_S, free_port
from tests.serving.parts import patience

BPDG = [sys.executable, "-m", "megatron_bpdg.cli"]


def bpdg(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BPDG, *map(str, arguments)], capture_output=True, text=True, timeout=DEADLINE_S)


def wait_for(text: str, output: Path) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while text not in (found := output.read_text()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


@pytest.fixture
def serving(miniature: Miniature, sglang: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path, int]]:
    """`bpdg serve student` that says it is ready: process, what it printed, port."""
    port, output = free_port(), tmp_path / "output"
    arguments = ["serve", "student", str(miniature.student), "--python", sglang, "--device", "cpu"]
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [*BPDG, *arguments, "--port", str(port), "--log", str(tmp_path / "log")],
            stdout=stream,
            stderr=stream,
            # Where the tests run in the background of a script, Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        wait_for("Ctrl-C stops it", output)
        yield process, output, port
    finally:
        process.kill()
        process.wait()


def processes_of(port: int) -> list[psutil.Process]:
    """The server's processes: those with the port on the command line, and theirs."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "sglang.launch_server" in command and str(port) in command:
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_serve_says_what_it_does_and_leaves_nothing_behind(
    serving: tuple[subprocess.Popen[bytes], Path, int], miniature: Miniature, number: signal.Signals
) -> None:
    process, output, port = serving
    printed = output.read_text()
    assert "-m sglang.launch_server --model-path" in printed
    assert f"ready: http://127.0.0.1:{port} serves {miniature.student}, float32, vocabulary " in printed
    started = processes_of(port)
    assert len(started) >= 2
    os.kill(process.pid, number)
    process.wait(timeout=DEADLINE_S)
    if number != signal.SIGKILL:
        assert process.returncode == 0
        assert f"stopped by {number.name}" in output.read_text()
    _, alive = psutil.wait_procs(started, timeout=DEADLINE_S)
    assert not alive


def test_serve_prints_the_command_only(miniature: Miniature, sglang: str) -> None:
    arguments = ["--python", sglang, "--port", 1, "--dry-run", "--", "--trust-remote-code"]
    done = bpdg("serve", "teacher", miniature.teacher, *arguments)
    assert done.returncode == 0
    assert "SGLANG_ENABLE_LOGPROB_CHUNK=1" in done.stdout
    assert done.stdout.rstrip().endswith("--trust-remote-code")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(("context", "tokens"), [(64, 16384), (40000, 40000)])
def test_the_cache_of_a_cpu_server_holds_a_whole_request(
    miniature: Miniature, sglang: str, context: int, tokens: int
) -> None:
    command = server_command(miniature.student, Role.STUDENT, python=sglang, device=Device.CPU, context_length=context)
    assert f"--max-total-tokens {tokens} " in str(command)


def test_serve_quotes_the_log_of_a_server_that_ends(miniature: Miniature, sglang: str, tmp_path: Path) -> None:
    arguments = ["--python", sglang, "--device", "cpu", "--port", free_port(), "--log", tmp_path / "log"]
    done = bpdg("serve", "student", miniature.student, *arguments, "--", "--no-such-flag")
    assert done.returncode == 1
    assert "the server ended with exit code 2 (a flag after `--` is none of SGLang's); the end of" in done.stderr
    assert "--no-such-flag" in done.stderr.split("the end of")[1]


def test_doctor_on_servers(miniature: Miniature, student_server: Any) -> None:
    done = bpdg("doctor", "--server", student_server.url, "--checkpoint", miniature.student)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = (student_server.url, "0.5.23", str(miniature.student)[:20], "float32", "the checkpoint's")
    for part in (*parts, "57 tokens of prompt and response", "responses end at"):
        assert part in done.stdout
    away = bpdg("doctor", "--server", "http://127.0.0.1:9")
    assert away.returncode == 1
    assert "http://127.0.0.1:9" in away.stdout
    assert "problem" in away.stdout


def test_a_server_left_paused_by_a_trainer_that_died(student_server: Any) -> None:
    async def pause() -> bool:
        async with Server(student_server.url, 600.0) as server:
            await server.post("/pause_generation", {"mode": "retract"})
            return await server.healthy(timeout_s=3.0)

    async def wait() -> set[str]:
        limits = patience(student_server.url)
        await wait_until_ready(limits, "rollout", None, Console(stderr=True), engines=[student_server.url])
        return await healthy([student_server.url], None)

    assert not asyncio.run(pause())
    done = bpdg("doctor", "--server", student_server.url)
    assert done.returncode == 1
    printed = " ".join(done.stdout.replace("│", " ").split())
    assert "it answers, but does not generate: paused by a trainer that died within a weight update" in printed
    assert asyncio.run(wait()) == {student_server.url}


def test_doctor_names_another_tokenizer_and_vocabulary(student_server: Any, tmp_path: Path) -> None:
    write_shape(tmp_path, vocab_size=VOCAB + 8)
    build_char_tokenizer(ALPHABET[::-1]).save_pretrained(tmp_path)
    done = bpdg("doctor", "--server", student_server.url, "--checkpoint", tmp_path)
    assert done.returncode == 1
    printed = " ".join(done.stdout.replace("│", " ").split())
    assert f"its vocabulary has {VOCAB} ids, the checkpoint's {VOCAB + 8}" in printed
    assert "has another tokenizer" in printed


def test_doctor_refuses_options_without_a_server() -> None:
    done = bpdg("doctor", "--checkpoint", "somewhere")
    assert done.returncode == 1
    assert "are about servers: name one with --server" in done.stderr
