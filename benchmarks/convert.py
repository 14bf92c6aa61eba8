"""Speed and peak memory of `bpdg convert` on a random checkpoint of a published Qwen3 shape, both ways.

    python benchmarks/convert.py 1.7B /scratch/bench --verify
    python benchmarks/convert.py --ranks 2 0.6B /scratch/bench

Needs twice the checkpoint's size of disk; deletes what it wrote. The peak is that of the largest process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import Qwen3Config

from megatron_bpdg.checkpoint.hf import hf_plan, plan_shards, write_index, write_shard
from megatron_bpdg.checkpoint.mapping import mapping_for
from megatron_bpdg.models.hf_config import read_hf_config

# layers, hidden, heads, groups, feed-forward, tied
SHAPES = {
    "0.6B": (28, 1024, 16, 8, 3072, True),
    "1.7B": (28, 2048, 16, 8, 6144, True),
    "4B": (36, 2560, 32, 8, 9728, True),
    "8B": (36, 4096, 32, 8, 12_288, False),
}


def write_random(path: Path, shape: str) -> int:
    """Stream a random bfloat16 checkpoint to `path`; returns its bytes."""
    layers, hidden, heads, groups, ffn, tied = SHAPES[shape]
    Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=128,
        intermediate_size=ffn,
        vocab_size=151_936,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ).save_pretrained(path)
    mapping = mapping_for(read_hf_config(path))
    plan = hf_plan(mapping, dict.fromkeys(mapping.by_key, torch.bfloat16), lm_head=False)
    generator = torch.Generator().manual_seed(0)
    # Bit patterns cost less than normal numbers, and a conversion must keep any.
    bits = (torch.randint(-(2**15), 2**15, tensor.shape, dtype=torch.int16, generator=generator) for tensor in plan)
    tensors = zip((tensor.name for tensor in plan), (b.view(torch.bfloat16) for b in bits), strict=True)
    shards = plan_shards(plan)
    for shard in shards:
        write_shard(path, shard, tensors)
    write_index(path, shards)
    return sum(tensor.num_bytes for tensor in plan)


def measured(source: Path, target: Path, options: list[str], ranks: int) -> tuple[float, float]:
    """Seconds and peak resident GB of one conversion in a process of its own, or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "megatron_bpdg.cli", "convert", source, target, *options]
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the conversion of {source} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="new scratch directory")
    parser.add_argument("--ranks", type=int, default=1, help="processes of torchrun")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed on to `bpdg convert`")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        # In another process: a child's peak begins at that of the process that starts it.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            size = pool.submit(write_random, args.folder / "hf", args.shape).result() / 1e9
        steps = [("HF to Megatron", "hf", "megatron"), ("Megatron to HF", "megatron", "back")]
        for title, source, target in steps:
            seconds, peak = measured(args.folder / source, args.folder / target, args.options, args.ranks)
            print(
                f"{args.shape} {title}: {size:.2f} GB in {seconds:.1f} s, {size / seconds:.2f} GB/s, peak {peak:.2f} GB"
            )
            shutil.rmtree(args.folder / source)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
