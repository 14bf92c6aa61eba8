"""What weighs tokens: factors and their products. Plain tensors, no process groups."""
