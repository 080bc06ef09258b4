"""Launches of any variant over random tensors and rows, for a back end's `prepare` and `run`, without an optimizer."""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xgrad_optim.adabelief import ADABELIEF
from xgrad_optim.adam import ADAM
from xgrad_optim.adam3 import ADAM3
from xgrad_optim.launch import Tables
from xgrad_optim.numeric import COMPUTE_DTYPES
from xgrad_optim.rule import Rule
from xgrad_optim.sgdm import SGDM

RULES = {rule.name: rule for rule in (SGDM, ADAM, ADABELIEF, ADAM3)}

N_ROWS = 7


@dataclass
class RandomLaunch:
    """What back ends read of a `Launch` (xgrad_optim/launch.py)."""

    rule: Rule
    dtype: torch.dtype
    state_dtype: torch.dtype
    params: list[Tensor]
    grads: list[Tensor] | None
    state: dict[str, list[Tensor]]
    rows: Tensor
    row_of: list[int]
    chunk_size: int
    trusts_master: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.compute_dtype = COMPUTE_DTYPES[self.dtype]
        self.reader = self.bound = None
        self.has_grad = self.grads is not None
        for param, grad in zip(self.params, self.grads or [], strict=False):
            param.grad = grad
        self.tables = Tables([param.numel() for param in self.params], self.row_of, self.chunk_size)

    def copied(self) -> "RandomLaunch":
        """The same launch over copies that are aligned as the originals are."""
        other = copy.copy(self)
        other.params = list(map(_copy, self.params))
        other.grads = self.grads and list(map(_copy, self.grads))
        other.state = {key: list(map(_copy, tensors)) for key, tensors in self.state.items()}
        other.__post_init__()
        return other

    def tensors(self) -> dict[str, Tensor]:
        slots = {"param": self.params, "grad": self.grads or [], **self.state}
        return {f"{name} {i}": tensor for name, slot in slots.items() for i, tensor in enumerate(slot)}


def random_launch(
    rule: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    has_grad: bool,
    has_max_exp_avg_sq: bool,
    has_master_weights: bool,
    trusts_master: bool,
    sizes: tuple[int, ...],
    chunk_size: int,
) -> RandomLaunch:
    """One buffer of each tensor is misaligned, in turn; rows switch each phase of the math on and off."""
    chosen = RULES[rule]
    keys = [*chosen.state_keys, *["max_exp_avg_sq"] * has_max_exp_avg_sq, *["master_weights"] * has_master_weights]
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
    state = {key: slot(key, compute if key == "master_weights" else state_dtype) for key in keys}
    row_of = [index % N_ROWS for index in range(len(sizes))]
    rows = _random_rows(chosen, has_grad).to(compute)
    if has_master_weights:
        for param, master in zip(params, state["master_weights"], strict=True):
            # What the master makes of them where nothing is to be undone; the others are foreign writes.
            param[::2] = master[::2].to(dtype)
    grads = slot("grad", dtype) if has_grad else None
    return RandomLaunch(chosen, dtype, state_dtype, params, grads, state, rows, row_of, chunk_size, trusts_master)


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
