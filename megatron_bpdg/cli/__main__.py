"""``python -m megatron_bpdg.cli``, as the ranks of a run are started."""

from megatron_bpdg.cli import main

main()
