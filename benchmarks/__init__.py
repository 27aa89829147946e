"""What effattn gains over eager PyTorch, Inductor and FlexAttention: ``python -m benchmarks.gpu_all --out DIR``."""
