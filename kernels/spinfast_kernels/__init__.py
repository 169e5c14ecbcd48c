"""Kernels of spinfast. Importable alone: needs torch, and triton for everything but `reference`."""
