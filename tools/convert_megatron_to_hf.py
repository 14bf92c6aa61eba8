"""Convert a Megatron-Core torch_dist checkpoint to an HF Qwen3 model directory."""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from megatron_bpdg.checkpoint.verify import compare_hf, megatron_to_hf

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a Megatron-Core torch_dist checkpoint of a Qwen3 (dense) model, saved at any tensor- and "
        "pipeline-parallel size, to an HF model directory with safetensors weights. Optimizer state is left out.",
        epilog="Example: python tools/convert_megatron_to_hf.py checkpoints/run1 models/run1 --dtype bfloat16",
    )
    parser.add_argument("source", help="checkpoint directory (its tracker picks the step) or one step's directory")
    parser.add_argument("destination", help="new HF model directory; appears only when complete")
    parser.add_argument(
        "--hf-source",
        help="HF directory that gives config.json and tokenizer; needed for checkpoints of other programs, which have "
        "no hf folder",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="cast the weights (default: as stored, byte for byte)")
    parser.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="per safetensors file (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DESTINATION if it exists")
    parser.add_argument(
        "--compare", metavar="HF_DIR", help="afterwards compare the result with this HF checkpoint, byte for byte"
    )
    args = parser.parse_args(argv)
    try:
        path = megatron_to_hf(
            args.source,
            args.destination,
            hf_source=args.hf_source,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            max_shard_size=int(args.max_shard_size * 10**9),
            overwrite=args.overwrite,
            console=Console(stderr=True),
        )
        differences = compare_hf(args.compare, path) if args.compare else []
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    if args.compare:
        print("\n".join(differences) or f"identical to {args.compare}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
