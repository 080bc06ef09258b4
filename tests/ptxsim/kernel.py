"""One kernel and its launches."""

import ctypes
import struct
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy

import ptxsim.instructions  # noqa: F401, it registers them
from ptxsim.executor import Executor, blocks_of
from ptxsim.machine import Machine
from ptxsim.memory import AddressMap, Memory
from ptxsim.parser import Parser
from ptxsim.program import Body, Instruction, Module, Parameter
from ptxsim.scalar_types import F32, F64, U8, is_float
from ptxsim.stats import Stats
from ptxsim.steps import Raise

Dimensions = int | Sequence[int]

BATCH_THREADS = 1024
"""Threads that run side by side where blocks do not wait for each other: numpy's calls then cost little each."""

_ORDERED = ("bar", "barrier", "atom", "red", "cp", "mbarrier")
"""What makes threads of a block, or blocks, wait for each other or see each other's order."""

_MACHINES = 4
"""Machines that a kernel keeps, each with its registers."""


def load_ptx(text: str | bytes) -> dict[str, "Kernel"]:
    """The kernels of a PTX text by name.

    Raises:
        PTXSyntaxError: it is not PTX that the parser knows.
    """
    module = Parser(text.decode() if isinstance(text, bytes) else text).parse()
    return {name: Kernel(module, body) for name, body in module.bodies.items()}


class Kernel:
    """One .entry.

    Attributes:
        name, params, directives, code: as they were declared.
    """

    def __init__(self, module: Module, body: Body) -> None:
        self._module, self._body = module, body
        self._machines: OrderedDict[tuple[Any, ...], Machine] = OrderedDict()

    name = property(lambda self: self._body.name)

    @property
    def params(self) -> list[Parameter]:
        return self._body.parameters

    @property
    def directives(self) -> dict[str, list[int]]:
        return self._body.directives

    @property
    def code(self) -> list[Instruction]:
        return self._body.code

    def launch(
        self,
        grid: Dimensions,
        block: Dimensions,
        args: Sequence[Any],
        mem: Memory,
        shared: int = 0,
        max_steps: int = 20_000_000,
        counts_traffic: bool = True,
    ) -> Stats:
        """Run the kernel.

        Args:
            grid, block: one to three numbers.
            args: one for each parameter: an int, a float, a numpy scalar; bytes or a ctypes.Structure for a struct; a
                numpy array or CPU tensor, which means its address.
            mem: the buffers that the kernel may touch.
            shared: bytes of dynamic shared memory.
            max_steps: instructions that a block may take; a loop that never ends is an error then.
            counts_traffic: whether the result tells of memory traffic, which takes about half of the time.

        Raises:
            PTXError: of the subclass that says what the kernel did.
            NotImplementedError: it reached an instruction that is not implemented.
            ValueError, TypeError: the launch is not one that this kernel can have.
        """
        grid, block = _three(grid), _three(block)
        self._check(grid, block)
        arguments = self._pack(args)
        blocks = blocks_of(grid)
        buffers = AddressMap([*mem.buffers.values(), *self._module.buffers().values()], mem.poison)
        stats = Stats(self.name, buffers, counts_traffic)
        stats.blocks, stats.threads = len(blocks), len(blocks) * prod(block)
        size = max(1, BATCH_THREADS // prod(block)) if self._is_unordered and not shared else 1
        executors: dict[int, Executor] = {}
        with numpy.errstate(all="ignore"):
            for start in range(0, len(blocks), size):
                batch = blocks[start : start + size]
                if len(batch) not in executors:
                    machine = self._machine(block, shared, len(batch))
                    machine.begin(grid, arguments, stats, buffers)
                    executors[len(batch)] = Executor(machine, max_steps)
                executors[len(batch)].run(batch)
        for executor in executors.values():
            stats.warp_instructions += executor.n_warp_instructions
            stats.max_instructions = max(stats.max_instructions, executor.most_instructions)
            for instruction, count in zip(self.code, executor.counts, strict=True):
                if count:
                    stats.by_opcode[instruction.op] += count
        stats.thread_instructions = stats.by_opcode.total()
        stats.finish()
        return stats

    def unsupported(self) -> list[str]:
        """Messages for the instructions that would raise NotImplementedError if they were reached."""
        block = _three(self.directives.get(".reqntid") or 32)
        with numpy.errstate(all="ignore"):
            steps = [step for step, _ in self._machine(block, 0, 1).code]
        return [str(s.error) for s in steps if isinstance(s, Raise) and isinstance(s.error, NotImplementedError)]

    def contractible(self) -> list[tuple[int, str]]:
        """(line, instruction) of float additions and products without a rounding modifier.

        ptxas may fuse these, so that a GPU rounds otherwise.
        """
        return [
            (instruction.line, instruction.text)
            for instruction in self.code
            if instruction.parts[0] in ("add", "sub", "mul")
            and is_float(instruction.parts[-1].removesuffix("x2"))
            and not {"rn", "rz", "rm", "rp"}.intersection(instruction.parts)
        ]

    @cached_property
    def _is_unordered(self) -> bool:
        """Whether blocks can run side by side: they share nothing, and their threads do not wait for each other."""
        variables = [*self._module.variables.values(), *self._body.variables.values()]
        shares = any(variable.space == "shared" for variable in variables)
        return not shares and not any(instruction.parts[0] in _ORDERED for instruction in self.code)

    def _machine(self, block: tuple[int, int, int], shared: int, n_blocks: int) -> Machine:
        key = block, shared, n_blocks
        if key not in self._machines:
            self._machines[key] = Machine(self._module, self._body, block, shared, n_blocks)
        self._machines.move_to_end(key)
        while len(self._machines) > _MACHINES:
            self._machines.popitem(last=False)
        return self._machines[key]

    def _check(self, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
        threads = prod(block)
        if not 1 <= threads <= 1024:
            raise ValueError(f"block {block}: {threads} threads (1 to 1024 are allowed)")
        if min(grid) < 1:
            raise ValueError(f"grid {grid} is empty")
        required = self.directives.get(".reqntid")
        if required and _three(required) != block:
            raise ValueError(f"{self.name} requires a block of {required}, not {block}")
        limit = self.directives.get(".maxntid")
        if limit and threads > prod(limit):
            raise ValueError(f"{self.name} allows at most {limit} threads, not {threads}")
        if prod(self.directives.get(".reqnctapercluster") or [1]) > 1:
            raise NotImplementedError(f"{self.name}: thread block clusters")
        if F32(1e-40) * F32(1) == 0:
            raise RuntimeError("this thread flushes subnormals (torch.set_flush_denormal?); results would be wrong")

    def _pack(self, args: Sequence[Any]) -> numpy.ndarray:
        """The arguments' bytes as the kernel reads them."""
        if len(args) != len(self.params):
            names = ", ".join(f"{parameter.name} .{parameter.type}" for parameter in self.params)
            raise ValueError(f"{self.name} takes {len(self.params)} arguments ({names}), {len(args)} given")
        packed = numpy.zeros(self._body.parameter_bytes, U8)
        for parameter, value in zip(self.params, args, strict=True):
            raw = _argument_bytes(parameter, value)
            if len(raw) != parameter.size:
                raise ValueError(f"{parameter.name}: {len(raw)} bytes given for a parameter of {parameter.size} bytes")
            packed[parameter.offset : parameter.offset + parameter.size] = numpy.frombuffer(raw, U8)
        return packed


def _argument_bytes(parameter: Parameter, value: Any) -> bytes:
    if isinstance(value, numpy.generic):
        if value.dtype.itemsize == parameter.size:
            return value.tobytes()
        value = value.item()
    if isinstance(value, bytes | bytearray | ctypes.Structure):
        return bytes(value)
    if isinstance(value, numpy.ndarray):
        return struct.pack("<Q", value.ctypes.data)
    if hasattr(value, "data_ptr"):
        return struct.pack("<Q", value.data_ptr())
    if parameter.is_array:
        raise TypeError(f"{parameter.name}: pass bytes for a struct parameter of {parameter.size} bytes")
    if isinstance(value, float) or is_float(parameter.type):
        if parameter.type in ("s32", "u32", "s64", "u64") or parameter.size not in (4, 8):
            raise TypeError(f"{parameter.name}: a float given for .{parameter.type}")
        return (F32 if parameter.size == 4 else F64)(value).tobytes()
    number, bits = int(value), 8 * parameter.size
    if not -(1 << (bits - 1)) <= number < 1 << bits:
        raise ValueError(f"{parameter.name}: {number} does not fit in {parameter.size} bytes")
    return (number & ((1 << bits) - 1)).to_bytes(parameter.size, "little")


def _three(dimensions: Dimensions) -> tuple[int, int, int]:
    numbers = [int(dimensions)] if isinstance(dimensions, int | numpy.integer) else list(map(int, dimensions))
    x, y, z = numbers + [1] * (3 - len(numbers))
    return x, y, z
