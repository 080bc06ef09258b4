"""What builds each instruction's steps, by subject; importing this package registers it all."""

from ptxsim.instructions import arithmetic, atomics, bits, comparisons, control, conversions, memory, moves, warps

__all__ = ["arithmetic", "atomics", "bits", "comparisons", "control", "conversions", "memory", "moves", "warps"]
