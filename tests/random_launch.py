"""Launches of any variant over random tensors, rows and numbers, as tables for a kernel, without an optimizer."""

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from family import RULES
from torch import Tensor

from xgrad_optim.backends import torch as torch_backend
from xgrad_optim.launch import NUMBERS, Tables, columns_of
from xgrad_optim.numeric import COMPUTE_DTYPES
from xgrad_optim.rule import Rule

N_ROWS = 7

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""In the order of `Dtype` in csrc/launch.h."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    rule: str
    dtype: torch.dtype
    state_dtype: torch.dtype
    has_grad: bool
    has_optional: bool = False
    has_master_weights: bool = False

    @property
    def buffers(self) -> tuple[bool, bool, bool]:
        return self.has_grad, self.has_optional, self.has_master_weights

    @property
    def n_states(self) -> int:
        return len(RULES[self.rule].state_keys) + self.has_optional

    def operands(self) -> tuple[list[int], list[int]]:
        """Bytes of an element of each buffer that a run must load, and of each that it must store."""
        param, state, master = (dtype.itemsize for dtype in (self.dtype, self.state_dtype, COMPUTE_DTYPES[self.dtype]))
        masters = [master] * self.has_master_weights
        if not self.has_grad:  # the running maximum stands in for the second moment
            return [param, *[state] * len(read_by_direction(RULES[self.rule])), *masters], [param, *masters]
        states = [state] * self.n_states
        return [param, param, *states, *masters], [param, *states, *masters]


def read_by_direction(rule: Rule) -> set[str]:
    """The states of which a prediction is made."""
    read = set()

    class Reads(dict):
        def __getitem__(self, key: str) -> Tensor:
            read.add(key)
            return super().__getitem__(key)

    hyper = SimpleNamespace(**{name: torch.ones(()) for name in rule.direction_columns})
    rule.direction(Reads({key: torch.ones(1) for key in rule.state_keys}), hyper, torch.empty(1))
    return read


def every_variant(rule: str) -> list[Variant]:
    """All that exist of a rule."""
    pairs = [(dtype, COMPUTE_DTYPES[dtype]) for dtype in DTYPES]
    pairs += [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)]
    return [
        Variant(rule, dtype, state_dtype, has_grad, has_optional, has_master)
        for dtype, state_dtype in pairs
        for has_grad in (False, True)
        for has_optional in ((False, True) if RULES[rule].optional else (False,))
        for has_master in ((False, True) if state_dtype.itemsize >= 4 else (False,))
    ]


def variants_for(rule: str, architecture: str, are_all: bool) -> list[Variant]:
    """All of a rule's variants on sm_90; on each other architecture every third one, another third on each.

    Compilers take half a second for one. `are_all` (pytest --all-variants) leaves none out.
    """
    variants, others = every_variant(rule), ("sm_80", "sm_100", "sm_120")
    if are_all or architecture not in others:
        return variants
    return variants[others.index(architecture) :: 3]


@dataclass
class RandomLaunch:
    """One launch: its tensors by slot, and its tables."""

    variant: Variant
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    rows: Tensor
    row_of: list[int]
    chunk_size: int
    numbers: list[Tensor] = field(default_factory=list)
    """Those of each tensor; every other one's are for the kernel to write."""

    def __post_init__(self) -> None:
        n_numbers = len(self.rule.number_keys)
        self.numbers = [torch.full((n_numbers,), -1.0, dtype=torch.float64) for _ in self.params]
        self.next_numbers = torch.arange(N_ROWS * n_numbers, dtype=torch.float64).view(N_ROWS, n_numbers)
        numels = [param.numel() for param in self.params]
        self.tables = tables = Tables(numels, self.row_of, self.chunk_size, self.variant.has_grad)
        columns = columns_of(self.rule)
        for name, slot in {"param": self.params, **self.state}.items():
            tables.table[:, columns[name]] = torch.tensor([tensor.data_ptr() for tensor in slot])
        numbers = [vector.data_ptr() * (index % 2) for index, vector in enumerate(self.numbers)]
        tables.table[:, NUMBERS] = torch.tensor(numbers)
        tables.grads[:] = torch.tensor([grad.data_ptr() for grad in self.grads], dtype=torch.int64)

    @property
    def rule(self) -> Rule:
        return RULES[self.variant.rule]

    def copied(self) -> "RandomLaunch":
        """The same launch over copies that are aligned as the originals are."""
        other = copy.copy(self)
        other.params, other.grads = list(map(_copy, self.params)), list(map(_copy, self.grads))
        other.state = {key: list(map(_copy, tensors)) for key, tensors in self.state.items()}
        other.__post_init__()
        return other

    def tensors(self) -> dict[str, Tensor]:
        slots = {"param": self.params, "grad": self.grads, **self.state, "numbers": self.numbers}
        return {f"{name} {i}": tensor for name, slot in slots.items() for i, tensor in enumerate(slot)}

    def run_on_cpu(self) -> None:
        """By the native CPU back end's operator."""
        tables, ops, variant = self.tables, torch.ops.xgrad_optim, self.variant
        kernel = ops.find_kernel_cpu(variant.rule, variant.dtype, variant.state_dtype, "")
        grads = tables.grads if variant.has_grad else None
        shape = (tables.chunks, tables.tasks, tables.chunk_size)
        ops.multi_tensor_cpu(tables.table, grads, self.rows, self.next_numbers, *shape, kernel)

    def run_on_torch(self) -> None:
        """By the torch back end's text of a block, each tensor as one."""
        scratch = torch_backend._Scratch(torch.device("cpu"), self.rows.dtype)
        for index, row in enumerate(self.row_of):
            if self.rows[row, self.rule.columns.index("is_skipped")]:
                continue
            slots = {"param": self.params, **self.state, **({"grad": self.grads} if self.grads else {})}
            block = {name: slot[index] for name, slot in slots.items()}
            scratch.fit(block["param"])
            torch_backend._run_block(self.rule, block, torch_backend._hyper(self.rule, self.rows[row]), scratch)
            if index % 2:
                self.numbers[index].copy_(self.next_numbers[row])


def random_launch(variant: Variant, sizes: tuple[int, ...], chunk_size: int) -> RandomLaunch:
    """One buffer of each tensor is misaligned, in turn; rows switch each phase of the math on and off."""
    rule, dtype = RULES[variant.rule], variant.dtype
    optional = [rule.optional.key] if variant.has_optional and rule.optional else []
    keys = [*rule.state_keys, *optional, *["master_weights"] * variant.has_master_weights]
    compute = COMPUTE_DTYPES[dtype]

    def slot(name: str, kind: torch.dtype) -> list[Tensor]:
        position, n_slots = ["param", "grad", *keys].index(name), 2 + len(keys)
        tensors = []
        for index, size in enumerate(sizes):
            values = torch.randn(size, dtype=torch.float64)
            shift = int(index % (n_slots + 1) == position)  # every so often all are aligned
            tensors.append(_place((values * values if "sq" in name else values).to(kind), shift))
        return tensors

    params = slot("param", dtype)
    state = {key: slot(key, compute if key == "master_weights" else variant.state_dtype) for key in keys}
    row_of = [index % N_ROWS for index in range(len(sizes))]
    rows = _random_rows(rule, variant.has_grad).to(compute)
    if variant.has_master_weights:
        for param, master in zip(params, state["master_weights"], strict=True):
            # What the master makes of them where nothing is to be undone; the others are foreign writes.
            param[::2] = master[::2].to(dtype)
    grads = slot("grad", dtype) if variant.has_grad else []
    return RandomLaunch(variant, params, grads, state, rows, row_of, chunk_size)


def _random_rows(rule: Rule, has_grad: bool) -> Tensor:
    rows = torch.rand(N_ROWS, len(rule.columns), dtype=torch.float64) * 0.9 + 0.05
    column = {name: index for index, name in enumerate(rule.columns)}
    for row in range(N_ROWS):
        rows[row, column["is_skipped"]] = float(row == 4)
        rows[row, column["grad_factor"]] = (1.0, -1.0, 0.125)[row % 3]
        if row % 2:
            rows[row, column["weight_decay"]] = 0.0
        if "momentum" in column and row == 2:
            rows[row, column["momentum"]] = 0.0
        if row in (3, 5) or not has_grad:  # a swap goes one way
            rows[row, column["shift" if row % 2 else "shift_prev"]] = 0.0
    return rows


def _place(values: Tensor, shift: int) -> Tensor:
    """A copy that begins `shift` elements after an address that is a multiple of 64."""
    room = torch.empty(values.numel() + 64 + shift, dtype=values.dtype)
    start = -(room.data_ptr() // values.element_size()) % (64 // values.element_size()) + shift
    return room[start : start + values.numel()].copy_(values)


def _copy(tensor: Tensor) -> Tensor:
    return _place(tensor, tensor.data_ptr() // tensor.element_size() % (64 // tensor.element_size()))
