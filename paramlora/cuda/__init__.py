"""16-bit products on NVIDIA's devices: kernels beside the plans that launch them, by operation."""
