"""A functional simulator of PTX in Python and numpy; README.md says what it can show, and what it can't.

memory = Memory()
memory.register(array_or_cpu_tensor, "name", writable=True)
kernel = load_ptx(text)["kernel_name"]
stats = kernel.launch(grid, block, args, memory, shared=0)
"""

from ptxsim.errors import BarrierError, MemoryFault, PTXError, PTXSyntaxError, StepLimitError, TrapError
from ptxsim.kernel import Kernel, load_ptx
from ptxsim.memory import Memory
from ptxsim.stats import BufferStats, Stats

__all__ = [
    "Memory",
    "load_ptx",
    "Kernel",
    "Stats",
    "BufferStats",
    "PTXError",
    "PTXSyntaxError",
    "MemoryFault",
    "BarrierError",
    "TrapError",
    "StepLimitError",
]
