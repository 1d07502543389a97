"""Capture kernels, one a module, as plain PyTorch references with float32 accumulation."""
