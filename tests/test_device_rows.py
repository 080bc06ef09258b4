"""The rows that a kernel makes of numbers on a device, and what these are next, are the host's in every bit.

They can break in the power (no library's is the host's), in a product and a sum that the compiler contracts, in how an
option is read from an address, and where a mode or a zero shift is overlooked.
"""

import math

import cuda_kernels
import numpy
import ptxsim
import pytest
import torch
from cuda_kernels import needs_compiler, needs_nvcc
from family import RULES
from twins import needs_library

from xgrad_optim.launch import LINE_LENGTH, NUMBERS
from xgrad_optim.rows import KINDS, make_row

triton_kernels = pytest.importorskip("triton_kernels", reason="the Triton kernels need the package triton")

STEPS = (0, 1, 2, 3, 7, 8, 1000, 99_999, 1_000_003)
N_TENSORS = 70
"""More than two warps."""


class RandomNumbers:
    """Groups whose options are numbers or tensors of any dtype, and tensors with numbers of any kind."""

    def __init__(self, rule: str, mode: bool | None, is_double: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rule, self.mode, self.is_double = RULES[rule], mode, is_double
        self.held: list[torch.Tensor] = []
        self.groups = [self._group(index, generator) for index in range(6)]
        self.group_of = torch.arange(N_TENSORS) % len(self.groups)
        n_numbers = len(self.rule.number_keys)
        self.numbers = torch.rand(N_TENSORS, n_numbers, dtype=torch.float64, generator=generator)
        self.numbers[:, 0] = torch.tensor([STEPS[index % len(STEPS)] for index in range(N_TENSORS)])
        self.numbers[:, 1] = torch.arange(N_TENSORS) // 7 % 2
        self.numbers[::11, 2] = 0.0
        self.rows = torch.full((N_TENSORS, len(self.rule.columns)), math.nan, dtype=self.dtype)
        self.next_numbers = torch.full((N_TENSORS, n_numbers), math.nan, dtype=torch.float64)
        self.table = torch.zeros((N_TENSORS, LINE_LENGTH), dtype=torch.int64)
        addresses = [vector.data_ptr() for vector in self.numbers]
        self.table[:, NUMBERS] = torch.tensor(addresses)
        self.options = torch.tensor([[self._entry(value) for value in group.values()] for group in self.groups])

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.is_double else torch.float32

    def _group(self, index: int, generator: torch.Generator) -> dict[str, float | torch.Tensor]:
        """The first one of numbers, the others of tensors of each dtype in turn."""
        drawn = torch.rand(len(self.rule.all_options), generator=generator, dtype=torch.float64)
        values: dict = dict(zip(self.rule.all_options, drawn.tolist(), strict=True))
        values |= {"decoupled_weight_decay": float(index % 2), "maximize": float(index // 2 % 2)}
        values |= {"found_inf": float(index == 4), "to_predicted": float(bool(self.mode))}
        kind = [None, *KINDS, None][index]
        if "beta2" in values:
            values["beta2"] = 0.96875 if kind in (torch.bfloat16, torch.float16) else 1 - 10.0 ** -(index + 1)
        if kind is None:
            return values
        tensors = {name: torch.tensor([7.0, value, 7.0]).to(kind)[1] for name, value in values.items()}
        self.held += tensors.values()
        return tensors

    def _entry(self, value: float | torch.Tensor) -> tuple[int, int]:
        if isinstance(value, torch.Tensor):
            return KINDS[value.dtype], value.data_ptr()
        return 0, int(numpy.float64(value).view(numpy.int64))

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The host's."""
        rows, numbers = [], []
        for group, vector in zip(self.group_of.tolist(), self.numbers.tolist(), strict=True):
            options = {name: float(value) for name, value in self.groups[group].items()}
            scaling = options["grad_scale"], options["found_inf"]
            row, after = make_row(self.rule, options, vector, self.mode, *scaling)
            rows.append(row)
            numbers.append(after)
        return torch.tensor(rows, dtype=self.dtype), torch.tensor(numbers, dtype=torch.float64)

    def memory(self) -> ptxsim.Memory:
        memory = ptxsim.Memory()
        for name in ("table", "group_of", "options", "numbers"):
            memory.register(getattr(self, name), name, writable=False)
        for index, tensor in enumerate(self.held):
            memory.register(tensor.reshape(1), f"option {index}", writable=False)
        for name in ("rows", "next_numbers"):
            memory.register(getattr(self, name), name)
        return memory


def run_triton(given: RandomNumbers) -> None:
    compiled = triton_kernels.compile_rows(given.rule.name, given.is_double, given.mode is None, "sm_90")
    kernel, grid = triton_kernels.load(compiled), -(-N_TENSORS // triton_kernels.rows.BLOCK)
    tables = [getattr(given, name) for name in ("table", "group_of", "options", "rows", "next_numbers")]
    values = [*tables, N_TENSORS]
    values += [0] * (len(kernel.params) - len(values))
    kernel.launch(grid, 32, values, given.memory(), shared=compiled.metadata.shared)


def _argument(given: RandomNumbers) -> cuda_kernels.RowsLaunch:
    names = ("table", "group_of", "options", "rows", "next_numbers")
    places = {name: getattr(given, name).data_ptr() for name in names}
    return cuda_kernels.RowsLaunch(**places, n_tensors=N_TENSORS, is_step=given.mode is None)


def run_cuda(given: RandomNumbers) -> None:
    name = given.rule.name
    kernel = cuda_kernels.load_ptx(name, "sm_90")[cuda_kernels.rows_symbol_of(name, given.is_double)]
    kernel.launch(1, cuda_kernels.THREADS, [_argument(given)], given.memory(), shared=0)


def run_emulated(given: RandomNumbers) -> None:
    cuda_kernels.make_rows_emulated(given.rule.name, given.is_double, _argument(given))


def run_cpu(given: RandomNumbers) -> None:
    """The operator of the native CPU back end, which makes a row of any tensor of the launch."""
    ops = torch.ops.xgrad_optim
    kernel = ops.find_kernel_cpu(given.rule.name, given.dtype, given.dtype, "")
    by_row = given.options[given.group_of].contiguous()
    members = torch.arange(N_TENSORS)
    rows, numbers = given.rows, given.next_numbers
    is_finite = ops.make_rows_cpu(given.table, members, by_row, rows, numbers, given.mode is None, kernel)
    assert is_finite == bool(rows.isfinite().all())


KERNELS = [
    pytest.param(run_cpu, id="cpu", marks=needs_library),
    pytest.param(run_triton, id="triton"),
    pytest.param(run_cuda, id="cuda", marks=needs_nvcc),
    pytest.param(run_emulated, id="cuda-emulated", marks=needs_compiler),
]


@pytest.mark.parametrize("run", KERNELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("mode", [None, True, False], ids=["step", "to theta_hat", "to theta"])
def test_rows_and_numbers_are_the_hosts(run, rule, is_double, mode):
    given = RandomNumbers(rule, mode, is_double)
    before = given.numbers.clone()
    run(given)
    rows, numbers = given.expected()
    assert not numbers.isnan().any() and len(rows.unique(dim=0)) > len(STEPS)
    for index, column in enumerate(given.rule.columns):
        assert torch.equal(given.rows[:, index], rows[:, index]), column
    assert torch.equal(given.next_numbers, numbers)
    assert torch.equal(given.numbers, before), "the launch after it writes them"
