"""The tables of overhead.py for one thread: the kernel by itself, in each cache and beyond, and steps of small models.

Of a step only the operator is timed here, called again with the arguments of a step that has been watched: no Python of
either side runs between two calls, which in a cache would take longer than the kernel does. The clock is the thread's
own, which stands still while another process has the processor.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from measuring import Report, interleave, make_params
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the table of optimizers

from family import FAMILY, MEMBERS, Member

from xgrad_optim import XSGDM, XAdamW

Optimizer = torch.optim.Optimizer
DTYPES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, float32 master weights and state": (torch.bfloat16, True),
    "float16": (torch.float16, False),
}
OPERATORS = ("xgrad_optim::multi_tensor_cpu", "aten::_fused_")
"""How the names of those begin that step all tensors at once."""
SMALL = 256
"""Elements of each tensor of a small model."""


class _Watch(TorchDispatchMode):
    """Keeps the operators of a step, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.name().startswith(OPERATORS):
            self.calls.append(functools.partial(operator, *args, **(kwargs or {})))
        return operator(*args, **(kwargs or {}))


def operator_of(optimizer: Optimizer) -> Callable[[], object]:
    """The one operator of a step that undoes a prediction, as the third one does.

    It may name tensors by their addresses alone: the optimizer must live as long.
    """
    optimizer.step()
    optimizer.step()
    with _Watch() as watch:
        optimizer.step()
    (call,) = watch.calls
    return call


def cache_bytes(level: int, default: int) -> int:
    """The size of a cache, as Linux tells it."""
    path = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
    return int(path.read_text().strip().removesuffix("K")) * 1024 if path.exists() else default


def levels() -> dict[str, int]:
    """Elements of float32 Adam, which has four buffers, that fill half of a cache, or six times the last one."""
    second, third = cache_bytes(2, 1 << 20), cache_bytes(3, 32 << 20)
    return {"L2": second // 32, "L3": third // 32, "memory": third // 16 * 6}


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nanoseconds(makers: Mapping[str, Callable[[int], Optimizer]], n: int, rounds: int) -> dict[str, float]:
    """Nanoseconds an element of each optimizer's kernel, on `n` elements.

    Calling an operator costs as much as thousands of elements do. An eighth of the elements costs it as well, so it is
    not in the difference. Small sizes take many short turns, of which other work on the machine disturbs few; a turn
    has several calls, as the first one after the others' finds their elements in the caches.
    """
    sizes = (n, n // 8)
    optimizers = {f"{name} {size}": make(size) for name, make in makers.items() for size in sizes}
    calls = {name: operator_of(optimizer) for name, optimizer in optimizers.items()}
    turns = rounds * max(1, min(20, 4_000_000 // n))
    seconds = interleave(calls, turns, in_a_row=max(2, 200_000 // n), clock=time.thread_time)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    whole, part = sizes
    return {name: (medians[f"{name} {whole}"] - medians[f"{name} {part}"]) / (whole - part) * 1e9 for name in makers}


def measure_thread(report: Report, rounds: int, sizes: Mapping[str, int] | None = None) -> None:
    """A table for each dtype: of each optimizer at each level, its kernel beside torch's fused one and beside s=0.

    Master weights are compared with float32, whose state they have: torch has none.
    """
    sizes = levels() if sizes is None else sizes
    columns = ["optimizer", "base"]
    columns += [f"{level} {what}" for level in sizes for what in ("ns", "to fused", "s=1/s=0")]
    with one_thread():
        for title, (dtype, has_master) in DTYPES.items():
            rows: list[list[object]] = []
            for member in FAMILY:
                peer = member.peer.__name__
                row: list[object] = [member.name, f"{peer} float32" if has_master else peer]
                for n in sizes.values():
                    measured = nanoseconds(_makers(member, dtype, has_master), n, rounds)
                    ours = measured["s=1"]
                    row += [ours, ours / measured["fused"], ours / measured["s=0"]]
                rows.append(row)
            report.table(f"the kernel on one thread, {title}", columns, rows)


def _makers(member: Member, dtype: torch.dtype, has_master: bool) -> dict[str, Callable[[int], Optimizer]]:
    def ours(steps: int) -> Callable[[int], Optimizer]:
        options = {"prediction_steps": steps, "backend": "cpu", "master_weights": has_master}
        if dtype is torch.float16:
            options |= dict.fromkeys(member.rule.stored_options, 1e-7)  # the default is 0 there, of which we warn
        return lambda n: member.cls(make_params([(n,)], dtype), **options)

    def fused(n: int) -> Optimizer:
        return member.make_peer(make_params([(n,)], torch.float32 if has_master else dtype), fused=True)

    return {"fused": fused, "s=1": ours(1), "s=0": ours(0)}


def measure_small_models(report: Report, backends: list[str], rounds: int) -> None:
    """Whole steps, Python included, which is the same for every rule, beside torch's default and its fused one."""
    counts = (1, 16, 64, 200)
    with one_thread():
        for cls in (XAdamW, XSGDM):
            base, name = MEMBERS[cls].make_peer, MEMBERS[cls].peer.__name__
            makers = {f"{name} default": base, f"{name} fused": functools.partial(base, fused=True)}
            makers |= {f"{cls.__name__} {backend}": functools.partial(cls, backend=backend) for backend in backends}
            medians: dict[str, list[float]] = {name: [] for name in makers}
            for count in counts:
                steps = {name: make(make_params([(SMALL,)] * count)).step for name, make in makers.items()}
                for name, times in interleave(steps, rounds, in_a_row=20, clock=time.thread_time).items():
                    medians[name].append(statistics.median(times) * 1e6)
            rows: list[list[object]] = [
                [count, own_name, own[index], *(own[index] / medians[peer][index] for peer in list(makers)[:2])]
                for index, count in enumerate(counts)
                for own_name, own in medians.items()
            ]
            columns = ["tensors", "optimizer", "us", "to default", "to fused"]
            report.table(f"steps of small models, tensors of {SMALL} elements", columns, rows)
