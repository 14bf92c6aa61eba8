"""Convert a Megatron-Core checkpoint to an HF model directory."""

from __future__ import annotations

import argparse
import sys

from megatron_bpdg.checkpoint.command import add_arguments, run_script


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a Megatron-Core checkpoint (torch_dist, or mp_rank files; saved at any layout) of Qwen3 "
        "dense or MoE, Qwen2/2.5 or Llama to an HF model directory with safetensors weights. Optimizer state is left "
        "out. Run it under torchrun to share the work.",
        epilog="Example: python tools/convert_megatron_to_hf.py checkpoints/run1 models/run1 --dtype bfloat16",
    )
    add_arguments(parser)
    return run_script(parser, argv, to="hf")


if __name__ == "__main__":
    sys.exit(main())
