"""Blockwise policy-drift gating: partitions, the gate, diagnostics. Plain tensors, no process groups."""
