"""Time and peak memory of the head's gated losses, forward and forward + backward, against peers.

    python benchmarks/head.py --output bench/head                       # CUDA where there is one: the full grid
    python benchmarks/head.py --output bench/head --hidden 1024 --tokens 256 512 --dtype float32 --repeats 3

Writes results.json, results.md and results.svg. Each measurement runs in a process of its own. Tensor-parallel shards
are emulated on one device by slicing the head: a rank's own work, without its collectives. Times are the best of the
repeats: of CUDA events on a GPU, of the process's own CPU time elsewhere, which other processes disturb less. An
implementation is only timed if it computes the gated loss: its gradients are compared with dense float64 ones first.
"/ ceiling" is the rate at which the bare products were done, over the best rate of one large product on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bpdg.config.layout import Layout
from megatron_bpdg.parallel.world import world

IMPLEMENTATIONS = ("chunked", "fused", "materialised", "torch", "compiled", "megatron", "liger", "products")
OBJECTIVES = ("sampled", "lsm")


def on_gpu() -> bool:
    return torch.cuda.is_available()


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The best of the repeats, after one unmeasured run."""
    run()
    seconds = []
    for _ in range(repeats):
        if on_gpu():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            started = time.process_time()
            run()
            seconds.append(time.process_time() - started)
    return min(seconds)


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if on_gpu() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds, and bytes at the peak beyond the inputs, weights and gradients, of one implementation."""
    from head_losses import GRADIENT_ERROR, Inputs, build, gradient_error, products

    if not on_gpu():
        torch.set_num_threads(case["threads"])
    device = "cuda" if on_gpu() else "cpu"
    with world(Layout(), seed=0):
        dtype = getattr(torch, case["dtype"])
        inputs = Inputs.random(
            case["tokens"], case["hidden"], case["vocab"] // case["shards"], case["k"], dtype, device
        )
        if case["name"] == "products":
            return {
                "one": best_seconds(lambda: products(inputs, 1), case["repeats"]),
                "three": best_seconds(lambda: products(inputs, 3), case["repeats"]),
            }
        if case["name"] == "gate":
            logprobs_N = inputs.old_logprobs_N + 0.1
            return {"forward": best_seconds(lambda: inputs.gate(logprobs_N), case["repeats"])}
        try:
            loss = build(case["name"], case["objective"], case["chunk_mb"], case["keep_mb"])
        except LookupError as reason:
            return {"not_measured": str(reason)}

        @torch.no_grad()
        def forward() -> None:
            loss(inputs)

        def both() -> None:
            inputs.hidden_NH.grad = inputs.weight_VH.grad = None
            loss(inputs).backward()

        try:
            # What is loaded and set up on first use is no part of a head's memory.
            error = gradient_error(loss, case["objective"], dtype, device)
            if error > GRADIENT_ERROR[dtype]:
                return {"not_measured": f"its gradient is wrong: {error:.2g} of the largest entry"}
            if on_gpu():
                torch.cuda.reset_peak_memory_stats()
            before = peak_bytes()
            both()
            gradients = inputs.hidden_NH.nbytes + inputs.weight_VH.nbytes
            extra = max(peak_bytes() - before - gradients, 0)
            seconds = {
                "forward": best_seconds(forward, case["repeats"]),
                "forward_backward": best_seconds(both, case["repeats"]),
            }
        except torch.cuda.OutOfMemoryError:
            return {"not_measured": "out of memory"}
        except Exception as error:
            if case["name"] != "compiled":
                raise
            return {"not_measured": f"torch.compile: {str(error).splitlines()[0]}"}
        return {**seconds, "extra_bytes": extra, "gradient_error": error}


def measured_apart(case: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a new process, so that its peak memory is its own."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(case)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def ceiling(dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of one large square product."""
    size, device = (8192, "cuda") if on_gpu() else (2048, "cpu")
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, repeats)


def machine(case: dict[str, Any]) -> dict[str, Any]:
    where = torch.cuda.get_device_name() if on_gpu() else f"{platform.processor() or platform.machine()} CPU"
    if not on_gpu():
        torch.set_num_threads(case["threads"])
    return {
        "device": where,
        "threads": None if on_gpu() else case["threads"],
        "torch": torch.__version__,
        "ceiling_flops": ceiling(getattr(torch, case["dtype"]), case["repeats"]),
    }


def table(rows: list[dict[str, Any]], ceiling_flops: float) -> str:
    """Markdown: seconds, and ratios to the bare products, to materialised logits and to the machine's best."""
    names = ["objective", "H", "T", "shards", "head", "forward s", "fwd + bwd s", "/ bare products", "/ materialised"]
    names += ["/ ceiling", "extra MB"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    found = {key(row): row for row in rows}
    for row in rows:
        if row["name"] in ("products", "gate"):
            continue
        start = f"| {row['objective']} | {row['hidden']} | {row['tokens']} | {row['shards']} | {row['name']} |"
        if "not_measured" in row:
            lines.append(f"{start} not measured: {row['not_measured']} | | | | | |")
            continue
        count, field = (3, "three") if row["objective"] == "sampled" else (1, "one")
        bare = found[key(row, "products", "sampled")][field]
        flops = count * 2 * row["tokens"] * row["hidden"] * (row["vocab"] // row["shards"])
        logits = found.get(key(row, "materialised"), {}).get("forward_backward")
        both = row["forward_backward"]
        ratio = f"{both / logits:.2f}" if logits else ""
        extra = row["extra_bytes"] / 1e6
        rate = flops / both / ceiling_flops
        times = f"{row['forward']:.4g} | {both:.4g} | {both / bare:.2f} | {ratio}"
        lines.append(f"{start} {times} | {rate:.2f} | {extra:.0f} |")
    return "\n".join(lines) + "\n"


def key(row: dict[str, Any], name: str | None = None, objective: str | None = None) -> tuple[Any, ...]:
    return row["hidden"], row["tokens"], row["shards"], name or row["name"], objective or row["objective"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward + backward against T, a panel per objective and quantity, for the largest H on one shard."""
    from matplotlib.figure import Figure

    hidden = max(row["hidden"] for row in rows)
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(OBJECTIVES), squeeze=False)
    quantities = (("forward_backward", "forward + backward, s", 1.0), ("extra_bytes", "beyond inputs, MB", 1e6))
    for (line, (field, label, unit)), (column, objective) in itertools.product(
        enumerate(quantities), enumerate(OBJECTIVES)
    ):
        axis = axes[line][column]
        for name in IMPLEMENTATIONS:
            mine = [r for r in rows if (r["name"], r["objective"], r["hidden"]) == (name, objective, hidden)]
            points = [(r["tokens"], r[field] / unit) for r in mine if r["shards"] == 1 and field in r]
            if points:
                axis.plot(*zip(*points), marker="o", label=name)
        axis.set(title=f"{objective}, H = {hidden}", xlabel="tokens", ylabel=label)
        axis.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--names", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--hidden", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16_384, 32_768])
    parser.add_argument("--shards", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--chunk-mb", type=float, default=128.0)
    parser.add_argument("--keep-mb", type=float, default=512.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return
    if args.output is None:
        parser.error("--output is needed")
    args.output.mkdir(parents=True, exist_ok=True)
    fixed = {name: getattr(args, name) for name in ("vocab", "k", "dtype", "chunk_mb", "keep_mb", "repeats", "threads")}
    names = ["products", "gate", *(name for name in args.names if name != "products")]
    report: dict[str, Any] = {"machine": machine(fixed), "results": []}
    rows = report["results"]
    for hidden, tokens, shards, name, objective in itertools.product(
        args.hidden, args.tokens, args.shards, names, args.objectives
    ):
        if name in ("products", "gate") and objective != args.objectives[0]:
            continue
        objective = "sampled" if name in ("products", "gate") else objective
        case = {"hidden": hidden, "tokens": tokens, "shards": shards, "name": name, "objective": objective, **fixed}
        rows.append({**case, **measured_apart(case)})
        shown = {field: value for field, value in rows[-1].items() if field not in fixed}
        print(" ".join(f"{field}={value}" for field, value in shown.items()), flush=True)
        (args.output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(rows, report["machine"]["ceiling_flops"])
    (args.output / "results.md").write_text(text)
    plot(rows, args.output / "results.svg")
    print(text)


if __name__ == "__main__":
    main()
