"""HF checkpoints to Megatron-Core's torch_dist and back, offline and for live models."""
