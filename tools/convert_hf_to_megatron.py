"""Convert an HF checkpoint (or Megatron mp_rank files) to Megatron-Core's torch_dist format."""

from __future__ import annotations

import argparse
import sys

from megatron_bpdg.checkpoint.command import add_arguments, run_script


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert an HF model directory (Qwen3 dense or MoE, Qwen2/2.5, Llama) to a Megatron-Core "
        "torch_dist checkpoint. The result loads at any tensor-, pipeline- and expert-parallel size. Needs no GPU and "
        "no Megatron; run it under torchrun to share the work.",
        epilog="Example: python tools/convert_hf_to_megatron.py models/Qwen3-4B checkpoints/qwen3-4b --verify",
    )
    add_arguments(parser)
    return run_script(parser, argv, to="megatron")


if __name__ == "__main__":
    sys.exit(main())
