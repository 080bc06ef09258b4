"""A kernel bound to the threads of some blocks: registers are arrays over threads, instructions closures over these."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy

from ptxsim.access import SHARED_START, Access
from ptxsim.errors import PTXError
from ptxsim.memory import AddressMap
from ptxsim.operands import Float, Integer, Not, Offset, Register, Sink, Special, Symbol, literal_bits
from ptxsim.program import Body, Instruction, Module
from ptxsim.scalar_types import BITS, DTYPES, SINT, U32, U64, UINT, is_float
from ptxsim.stats import Stats
from ptxsim.steps import BUILDERS, Compute, Mask, Raise, Step

POISON = {8: 0xFD, 16: 0xFFFD, 32: 0xFFF7DEAD, 64: 0xFFF7DEADFFF7DEAD}
"""What registers hold before anything is written to them, by width: a NaN."""


Guard = tuple[numpy.ndarray, bool] | None


class Machine:
    """`n_blocks` equal blocks side by side.

    Attributes:
        n_threads, n_warps: of all blocks.
        thread, lane, warp: of each thread: its index, the one in its warp, its warp's.
        thread_index, block_index: %tid and %ctaid.
        parameters: the bytes of the kernel's arguments.
        carry: the condition code of add.cc and the like.
        access: the way to memory.
        code: each instruction as a step, with its guard.
    """

    def __init__(self, module: Module, body: Body, block: tuple[int, int, int], shared: int, n_blocks: int) -> None:
        self.body, self.block, self.n_blocks = body, block, n_blocks
        block_threads = block[0] * block[1] * block[2]
        self.block_warps = -(-block_threads // 32)
        self.n_threads = block_threads * n_blocks
        self.n_warps = self.block_warps * n_blocks
        linear = numpy.tile(numpy.arange(block_threads, dtype=U32), n_blocks)
        block_of = numpy.repeat(numpy.arange(n_blocks, dtype=U64), block_threads)
        self.thread = numpy.arange(self.n_threads, dtype=numpy.intp)
        self.lane = linear & U32(31)
        self.warp = block_of * U64(self.block_warps) + (linear >> U32(5))
        self._warp_index = self.warp.astype(numpy.intp)
        width, height = U32(block[0]), U32(block[1])
        self.thread_index = (linear % width, linear // width % height, linear // (width * height))
        self.block_index = tuple(numpy.zeros(self.n_threads, U32) for _ in "xyz")
        self.grid_size = tuple(numpy.zeros(self.n_threads, U32) for _ in "xyz")
        self._make_registers()
        self._lay_out(module, shared)
        self._where = ""
        self.code: list[tuple[Step, Guard]] = [self._compile(instruction) for instruction in body.code]

    # -- state -----------------------------------------------------------------------------------------------------

    def _make_registers(self) -> None:
        keys: dict[int, list[str]] = defaultdict(list)
        for key, kind in self.body.registers.items():
            if BITS[kind] == 128:
                keys[64] += [f"{key}#low", f"{key}#high"]
            else:
                keys[BITS[kind]].append(key)
        self._pools = {
            width: numpy.zeros((len(names), self.n_threads), numpy.bool_ if width == 1 else UINT[width])
            for width, names in keys.items()
        }
        self._raw = {key: row for width in keys for key, row in zip(keys[width], self._pools[width], strict=True)}
        self._views: dict[tuple[str, Any], numpy.ndarray] = {}
        self._specials: dict[str, numpy.ndarray] = {}
        self.carry = numpy.zeros(self.n_threads, numpy.bool_)

    def _lay_out(self, module: Module, shared: int) -> None:
        """Give every variable and parameter its space and address."""
        self._symbols: dict[str, tuple[str, int]] = {}
        shared_end, local_end, dynamic, dynamic_align = SHARED_START, 0, [], 16
        for key, variable in [*module.variables.items(), *self.body.variables.items()]:
            if variable.space == "shared" and variable.size == 0:
                dynamic.append(key)
                dynamic_align = max(dynamic_align, variable.align)
            elif variable.space == "shared":
                start = -(-shared_end // variable.align) * variable.align
                self._symbols[key] = ("shared", start)
                shared_end = start + variable.size
            elif variable.space in ("local", "param"):
                start = -(-local_end // variable.align) * variable.align
                self._symbols[key] = ("local", start)
                local_end = start + variable.size
        if dynamic:
            shared_end = -(-shared_end // dynamic_align) * dynamic_align
            self._symbols.update((key, ("shared", shared_end)) for key in dynamic)
        for parameter in self.body.parameters:
            self._symbols.setdefault(parameter.name, ("param", parameter.offset))
        self._symbols.update((key, ("global", buffer.base)) for key, buffer in module.buffers().items())
        self._dynamic_shared, self._total_shared = shared, shared_end + shared - SHARED_START
        self.access = Access(self, shared_end + shared, local_end)

    def begin(self, grid: tuple[int, int, int], arguments: numpy.ndarray, stats: Stats, buffers: AddressMap) -> None:
        """Start a launch."""
        for axis, size in zip(self.grid_size, grid, strict=True):
            axis[:] = size
        self.access.parameters[: len(arguments)] = arguments
        self.access.stats, self.access.buffers = stats, buffers

    def reset(self) -> None:
        """Nothing of the last blocks is left: what is read before it is written is poison."""
        for width, pool in self._pools.items():
            pool.fill(False if width == 1 else POISON[width])
        self.access.reset()
        self.carry.fill(False)

    def warp_bits(self, threads: numpy.ndarray) -> numpy.ndarray:
        """A mask of threads as 32 bits for each warp."""
        block_threads = self.n_threads // self.n_blocks
        lanes = numpy.zeros((self.n_blocks, self.block_warps * 32), numpy.bool_)
        lanes[:, :block_threads] = threads.reshape(self.n_blocks, block_threads)
        return numpy.packbits(lanes.reshape(self.n_warps, 32), axis=1, bitorder="little").view(U32).reshape(-1)

    def per_thread(self, of_warps: numpy.ndarray) -> numpy.ndarray:
        """Each thread's element of an array over warps."""
        return of_warps[self._warp_index]

    # -- operands --------------------------------------------------------------------------------------------------

    def register_bits(self, key: str) -> int:
        return BITS[self.body.registers[key]] if key in self.body.registers else 64

    def view(self, key: str, dtype: Any) -> numpy.ndarray:
        """The low part of a register as this dtype; writes go to the register."""
        found = self._views.get((key, dtype))
        if found is not None:
            return found
        raw = self._raw.get(key)
        if raw is None:
            raise self.unsupported("a 128-bit register operand")
        width = numpy.dtype(dtype).itemsize
        if (raw.dtype == numpy.bool_) != (dtype is numpy.bool_):
            raise PTXError(f"{self._where}: predicate and data registers are mixed")
        if raw.dtype.itemsize < width:
            raise PTXError(f"{self._where}: register {key.split('#')[0]} is narrower than the operation")
        view = raw if dtype is numpy.bool_ else raw.view(dtype)[:: raw.dtype.itemsize // width]
        self._views[key, dtype] = view
        return view

    def source(self, operand: Any, kind: str) -> numpy.ndarray:
        """An operand as an array over threads, with the dtype of this scalar type."""
        dtype = DTYPES[kind]
        match operand:
            case Register():
                return self.view(operand.key, dtype)
            case Integer() | Float() if kind == "pred":
                return numpy.full(self.n_threads, bool(operand.value))
            case Integer() | Float():
                return self._constant(literal_bits(operand, kind), kind)
            case Special():
                values = self.special(operand.name)
                step, rest = divmod(values.dtype.itemsize, numpy.dtype(dtype).itemsize)
                if rest:
                    raise self.unsupported(f"{operand.name} read as .{kind}")
                return values.view(dtype)[::step]
            case Symbol():
                return self._constant(self.symbol(operand.name)[1], kind)
            case Offset(base=Symbol()):
                return self._constant(self.symbol(operand.base.name)[1] + operand.offset, kind)
        raise self.unsupported(f"operand {operand}")

    def _constant(self, bits: int, kind: str) -> numpy.ndarray:
        width = BITS[kind]
        return numpy.full(self.n_threads, bits & ((1 << width) - 1), UINT[width]).view(DTYPES[kind])

    def predicate(self, operand: Any) -> Callable[[], numpy.ndarray]:
        """A function that gives a predicate operand's present values."""
        if isinstance(operand, Not):
            values = self.source(operand.operand, "pred")
            return lambda: ~values
        values = self.source(operand, "pred")
        return lambda: values

    def destination(self, operand: Any, kind: str) -> numpy.ndarray | None:
        """The array to write values of this type to, None for `_`.

        In a wider register an integer is extended by its sign, or by zeros.
        """
        if isinstance(operand, Sink):
            return None
        if not isinstance(operand, Register):
            raise self.unsupported(f"destination {operand}")
        width = self.register_bits(operand.key)
        if kind == "pred" or width == BITS[kind]:
            return self.view(operand.key, DTYPES[kind])
        if width < BITS[kind]:
            raise PTXError(f"{self._where}: the destination is narrower than .{kind}")
        if kind in ("s8", "s16", "s32", "s64"):
            return self.view(operand.key, SINT[width])
        if is_float(kind) and kind not in ("f16", "bf16"):
            raise PTXError(f"{self._where}: .{kind} written to a wider register")
        return self.view(operand.key, UINT[width])

    def symbol(self, name: str) -> tuple[str, int]:
        """The space of a variable or parameter, and its address there."""
        if name not in self._symbols:
            raise self.unsupported(f"unknown symbol {name}")
        return self._symbols[name]

    def special(self, name: str) -> numpy.ndarray:
        """A special register's values, which the machine updates in place."""
        if name not in self._specials:
            self._specials[name] = self._make_special(name)
        return self._specials[name]

    def _make_special(self, name: str) -> numpy.ndarray:
        base, _, component = name.partition(".")
        axis = "xyz".find(component) if component else 0
        below = (U32(1) << self.lane) - U32(1)
        itself = U32(1) << self.lane
        vectors = {
            "%tid": self.thread_index,
            "%ntid": [self._full(n) for n in self.block],
            "%ctaid": self.block_index,
            "%clusterid": self.block_index,
            "%nctaid": self.grid_size,
            "%nclusterid": self.grid_size,
            "%cluster_ctaid": [self._full(0)] * 3,
            "%cluster_nctaid": [self._full(1)] * 3,
        }
        scalars = {
            "%cluster_ctarank": 0,
            "%cluster_nctarank": 1,
            "%nwarpid": self.block_warps,
            "%smid": 0,
            "%nsmid": 1,
            "%gridid": 0,
            "%clock": 0,
            "%clock_hi": 0,
            "%dynamic_smem_size": self._dynamic_shared,
            "%total_smem_size": self._total_shared,
            "WARP_SZ": 32,
        }
        arrays = {
            "%laneid": self.lane,
            "%warpid": (self.warp % U64(self.block_warps)).astype(U32),
            "%lanemask_eq": itself,
            "%lanemask_lt": below,
            "%lanemask_le": below | itself,
            "%lanemask_gt": ~(below | itself),
            "%lanemask_ge": ~below,
            "%clock64": numpy.zeros(self.n_threads, U64),
            "%globaltimer": numpy.zeros(self.n_threads, U64),
        }
        if base in vectors and component and axis >= 0:
            return vectors[base][axis]
        if base in scalars:
            return self._full(scalars[base])
        if base in arrays:
            return arrays[base]
        raise self.unsupported(f"special register {name}")

    def _full(self, value: int) -> numpy.ndarray:
        return numpy.full(self.n_threads, value, U32)

    # -- compilation -----------------------------------------------------------------------------------------------

    def _compile(self, instruction: Instruction) -> tuple[Step, Guard]:
        self._where = f"kernel {self.body.name}, PTX line {instruction.line}: `{instruction.text}`"
        guard = None
        if instruction.guard is not None:
            guard = self.view(instruction.guard[0], numpy.bool_), instruction.guard[1]
        try:
            if instruction.parts[0] not in BUILDERS:
                raise self.unsupported()
            return BUILDERS[instruction.parts[0]](self, instruction), guard
        except (NotImplementedError, KeyError, IndexError, ValueError, TypeError) as error:
            # An error only where it is reached: kernels hold paths for other cases, and forms that nobody knows yet.
            text = str(error) if str(error).startswith("kernel ") else f"{self._where}: not implemented ({error!r})"
            return Raise(NotImplementedError(text)), guard

    @property
    def where(self) -> str:
        """The instruction that is being compiled, in words."""
        return self._where

    def unsupported(self, what: str = "") -> NotImplementedError:
        return NotImplementedError(f"{self._where}: not implemented" + (f" ({what})" if what else ""))

    def assign(self, destination: numpy.ndarray | None, function: Any, *sources: numpy.ndarray) -> Compute:
        """The step that writes `function(*sources)` to the destination."""
        if destination is None:
            return Compute(lambda mask: None)
        if isinstance(function, numpy.ufunc) and function.nout == 1:
            result = function.resolve_dtypes((*(source.dtype for source in sources), None))[-1]
            if result == destination.dtype:

                def run_ufunc(mask: Mask) -> None:
                    if mask is None:
                        function(*sources, out=destination)
                    else:
                        function(*sources, out=destination, where=mask)

                return Compute(run_ufunc)

        def run(mask: Mask) -> None:
            put(destination, function(*sources), mask)

        return Compute(run)


def put(destination: numpy.ndarray, values: Any, mask: Mask) -> None:
    """Write values where the mask is set; integers wrap around or are extended."""
    numpy.copyto(destination, values, casting="unsafe", where=True if mask is None else mask)
