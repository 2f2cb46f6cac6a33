"""16-bit products of few rows that take different updates, as in decoding: bound by memory alone."""
