"""The modules of the benchmark programs."""
