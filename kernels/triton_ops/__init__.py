"""Everything that needs Triton: the kernels, and whether they can run here (support.py, which imports without it)."""
