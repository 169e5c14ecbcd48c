"""Kernels of spinfast. Importable alone: needs torch, triton for a GPU's kernels and numba for a CPU's."""
