"""16-bit products of experts on CUDA: each expert's rows by its own matrices."""
