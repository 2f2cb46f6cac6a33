"""Look-ups in a table with a low-rank update: the kernels, and the plan of their launches."""
