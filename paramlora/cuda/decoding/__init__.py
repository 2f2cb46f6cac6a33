"""16-bit products of few rows, as in decoding, whose time is that of reading weight and factors."""
