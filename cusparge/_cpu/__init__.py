"""The CPU backend: NumPy and its BLAS, computing the selected blocks only."""

from cusparge._cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
