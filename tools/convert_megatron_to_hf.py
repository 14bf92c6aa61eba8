"""Convert a Megatron-Core checkpoint to an HF model directory: `bpdg convert --to hf`, with its options.

python tools/convert_megatron_to_hf.py checkpoints/run1 models/run1 --dtype bfloat16
"""

from __future__ import annotations

import sys

from megatron_bpdg.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "--to", "hf"]
    main()
