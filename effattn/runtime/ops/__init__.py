"""What rewritten graphs call: torch.library ops, their fake kernels and gradients."""
