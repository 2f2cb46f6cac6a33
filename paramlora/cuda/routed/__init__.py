"""16-bit products whose rows take different updates, on CUDA: one grouped low-rank product."""
