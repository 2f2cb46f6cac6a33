"""DoRA's norms and its outputs' lengths: the kernels, and the plan of each launch."""
