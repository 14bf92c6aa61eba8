"""Convert an HF checkpoint (or mp_rank files) to Megatron's torch_dist: `bpdg convert --to megatron`, with its options.

python tools/convert_hf_to_megatron.py models/Qwen3-4B checkpoints/qwen3-4b --verify
"""

from __future__ import annotations

import sys

from megatron_bpdg.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "--to", "megatron"]
    main()
