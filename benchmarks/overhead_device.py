"""The cost of weight prediction on a device: optimizers beside torch.optim's and beside the paper's own procedure.

On a GPU the times are those between events on its stream; on a CPU, where the same tables can be tried, they are a
clock's and labelled so. A device that is not there gets no number. Contenders run one after the other, as the largest
models leave no room for two.

The lower bound is what moves the bytes that the base optimizer must move at the rate of a copy on this device, measured
in the same run; rates and shares are of those bytes, also for a contender that moves more.
"""

import functools
import inspect
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from literal_procedure import LiteralProcedure
from measuring import Report, Shapes, cpu_name, gpt2_shapes, llama_shapes, make_params, resnet50_shapes

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the table of optimizers

from family import FAMILY, Member

from xgrad_optim import available_backends

WORKLOADS: dict[str, Shapes] = {
    "resnet-50": resnet50_shapes(),
    "gpt2-small": gpt2_shapes(768, 12),
    "llama-1b": llama_shapes(),
    "small-tensors": [(64,)] * 10000,
}

WARMUP = 3
"""Steps before the first one that counts: state, tables and compiled kernels come into being."""


FAMILIES = {member.name.removeprefix("X"): member for member in FAMILY}

Contender = Callable[[list[torch.Tensor]], "torch.optim.Optimizer | LiteralProcedure"]


def our_backends(device: str) -> list[str]:
    """Those that are made for this kind of device and can run on it."""
    reasons = available_backends()
    return [name for name in (("cpu",) if device == "cpu" else ("triton", "cuda")) if reasons[name] is None]


def contenders(member: Member, device: str) -> Iterator[tuple[str, Contender]]:
    """Base, ours without and with prediction, and the paper's procedure around the fastest base that there is."""
    backends = our_backends(device)
    base: Contender
    if member.is_base:
        ways = [how for how in ("fused", "foreach") if how in inspect.signature(member.like).parameters]
        for how in ways:
            yield f"torch {how}", functools.partial(member.make_base, **{how: True})
        base = functools.partial(member.make_base, **{ways[0]: True})
    else:
        base = functools.partial(member.cls, prediction_steps=0, backend=backends[0] if backends else "torch")
    for backend in backends:
        for steps in (0, 1):
            yield f"{backend} s={steps}", functools.partial(member.cls, prediction_steps=steps, backend=backend)
    yield "three passes", lambda params: LiteralProcedure(base(params), member.move_ahead)


class CpuClock:
    """Times of a CPU, which waits for every operation anyway."""

    device: str = "cpu"
    label: str = "perf_counter on a CPU"

    def __init__(self) -> None:
        self.machine = cpu_name()

    def seconds(self, call: Callable[[], object], rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def host_seconds(self, call: Callable[[], object], rounds: int) -> float | None:
        return None

    def launches(self, call: Callable[[], object]) -> int | None:
        return None

    def start_peak(self) -> None:
        pass

    def peak(self) -> int | None:
        return None


class CudaClock:
    """Times between events on the current stream, steps one right after the other."""

    device: str = "cuda"
    label: str = "events on the device"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device, so there are no numbers of one. Use --device cpu to try it")
        self.machine = torch.cuda.get_device_name()

    def seconds(self, call: Callable[[], object], rounds: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def host_seconds(self, call: Callable[[], object], rounds: int) -> float | None:
        """Until the call returns, with nothing queued before it."""
        times = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def launches(self, call: Callable[[], object]) -> int | None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)

    def start_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        """Bytes of the allocator beyond those at the start."""
        return torch.cuda.max_memory_allocated() - self._before


Clock = CpuClock | CudaClock


def scaled(shapes: Shapes, scale: float) -> Shapes:
    """Fewer elements: of each tensor, or of tensors where they are all small."""
    if max(map(math.prod, shapes)) <= 64:
        return shapes[: max(1, round(len(shapes) * scale))]
    return [(max(1, round(shape[0] * scale)), *shape[1:]) for shape in shapes]


def copy_bandwidth(clock: Clock, elements: int, rounds: int) -> float:
    """Bytes per second, read and written, of torch's copy between two tensors as large as the workload."""
    source = torch.randn(max(elements, 1 << 22), device=clock.device)
    target = torch.empty_like(source)
    seconds = clock.seconds(lambda: target.copy_(source), WARMUP + rounds)[WARMUP:]
    return 2 * source.nbytes / statistics.median(seconds)


TIMES = ["ms", "20 %", "80 %", "bound ms", "x bound", "GB/s", "share", "host ms"]
COLUMNS = ["optimizer", "contender", *TIMES, "launches", "peak B/element"]


def measure(clock: Clock, shapes: Shapes, make: Contender, rounds: int) -> dict[str, float | int | None]:
    params = make_params(shapes, device=clock.device)
    clock.start_peak()
    step = make(params).step
    for _ in range(WARMUP):
        step()
    peak = clock.peak()
    seconds = clock.seconds(step, rounds)
    low, middle, high = (float(numpy.quantile(seconds, q)) * 1e3 for q in (0.2, 0.5, 0.8))
    host = clock.host_seconds(step, rounds)
    elements = sum(param.numel() for param in params)
    return {
        "ms": middle,
        "20 %": low,
        "80 %": high,
        "host ms": None if host is None else host * 1e3,
        "launches": clock.launches(step),
        "peak B/element": None if peak is None else peak / elements,
    }


def measure_device(device: str, names: list[str], scale: float, rounds: int, out: Path, seconds: float) -> None:
    """Measure the contenders on this machine's device: see `measure_with`.

    Raises:
        RuntimeError: this machine does not have the device.
    """
    measure_with(CudaClock() if device == "cuda" else CpuClock(), FAMILIES, names, scale, rounds, out, seconds)


def measure_with(
    clock: Clock, families: dict[str, Member], names: list[str], scale: float, rounds: int, out: Path, seconds: float
) -> None:
    """Print a table for each workload; write all numbers as JSON lines, tables and a plot into `out`.

    The files are named after the device. After so many `seconds` nothing more is begun; what was left out is named.
    """
    end = time.monotonic() + seconds
    report = Report(clock.machine, clock=clock.label, scale=scale, backends=our_backends(clock.device))
    print(f"{clock.machine}, {clock.label}, torch {torch.__version__}, back ends {our_backends(clock.device)}")
    left_out = []
    for name in names:
        shapes = scaled(WORKLOADS[name], scale)
        elements = sum(map(math.prod, shapes))
        rows: list[list[object]] = []
        bandwidth = 0.0
        for family_name, family in families.items():
            for contender, make in contenders(family, clock.device):
                if time.monotonic() > end:
                    left_out.append(f"{name} {family_name} {contender}")
                    continue
                bandwidth = bandwidth or copy_bandwidth(clock, elements, rounds)
                bound = family.bytes_per_element * elements / bandwidth * 1e3
                result = measure(clock, shapes, make, rounds)
                ratio = result["ms"] / bound
                derived = {"bound ms": bound, "x bound": ratio, "GB/s": bandwidth / ratio / 1e9, "share": 1 / ratio}
                numbers = {"optimizer": family_name, "contender": contender, **result, **derived}
                rows.append([numbers[column] for column in COLUMNS])
        if rows:
            moves = f"a copy moves {bandwidth / 1e9:.0f} GB/s"
            report.table(f"{name}: {len(shapes)} tensors, {elements} elements, float32; {moves}", COLUMNS, rows)
    if left_out:
        print(f"left out after {seconds:.0f} s: {', '.join(left_out)}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"overhead_{slug(clock.machine)}"
    report.save(path.with_suffix(".jsonl"))
    report.save_markdown(path.with_suffix(".md"), f"A step on {clock.machine}", clock.label)
    plot(report, f"{clock.machine}, {clock.label}", list(families), path.with_suffix(".png"))
    print(f"written to {path}.jsonl, .md and .png")


def slug(machine: str) -> str:
    """The device's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") or "unknown"


def plot(report: Report, subtitle: str, families: list[str], path: Path) -> None:
    """For each workload and optimizer, each contender's time over the lower bound, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(str(row["table"]) for row in report.rows))
    if not titles:
        return
    names = list(dict.fromkeys(str(row["contender"]) for row in report.rows))
    figure, axes = pyplot.subplots(len(titles), 1, figsize=(11, 3 * len(titles)), squeeze=False, layout="constrained")
    width = 0.85 / len(names)
    for axis, title in zip(axes[:, 0], titles, strict=True):
        for position, name in enumerate(names):
            rows = [row for row in report.rows if (row["table"], row["contender"]) == (title, name)]
            places = [families.index(str(row["optimizer"])) + (position - len(names) / 2) * width for row in rows]
            axis.bar(places, [row["x bound"] for row in rows], width * 0.95, label=name, align="edge")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(families)), families)
        axis.set_ylabel("time / lower bound")
        axis.set_yscale("log")
        axis.set_title(title, loc="left", fontsize=9)
    axes[0, 0].legend(ncols=len(names), fontsize=8)
    figure.suptitle(f"A step over what the bytes alone would take ({subtitle})", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
