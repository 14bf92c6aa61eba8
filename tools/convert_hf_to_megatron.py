"""Convert an HF Qwen3 checkpoint to Megatron-Core's torch_dist format."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from megatron_bpdg.checkpoint.verify import hf_to_megatron


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert an HF Qwen3 (dense) model directory to a Megatron-Core torch_dist checkpoint. The result "
        "does not depend on a layout: it loads at any tensor- and pipeline-parallel size. Needs no GPU and one "
        "layer's tensor of memory at a time.",
        epilog="Example: python tools/convert_hf_to_megatron.py models/Qwen3-4B checkpoints/qwen3-4b",
    )
    parser.add_argument("source", help="HF model directory: config.json and *.safetensors (one file or sharded)")
    parser.add_argument("destination", help="new checkpoint directory; appears only when complete")
    parser.add_argument("--overwrite", action="store_true", help="replace DESTINATION if it exists")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        path = hf_to_megatron(args.source, args.destination, overwrite=args.overwrite, console=console)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
