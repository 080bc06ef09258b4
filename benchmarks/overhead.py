"""What weight prediction costs: a step of each optimizer beside torch.optim's, interleaved in one process.

Every contender has parameters and state of its own, takes one step per round, and the rounds alternate, so that a
machine that slows down slows all of them. Printed are medians, the 20 % and 80 % quantiles, the ratio of medians to
the peer named in the table, and the rate at which the bytes that must move were moved.

    python benchmarks/overhead.py                        every section, GPT-2 small
    python benchmarks/overhead.py step --workload tiny   one section, a small model
    python benchmarks/overhead.py --json out.json        the numbers as JSON lines too
    python benchmarks/overhead.py --device cuda          a GPU: four models, and the paper's procedure too
    python benchmarks/overhead.py --device cpu --scale 0.01    the same tables on the CPU, tried on small models
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from measuring import Report, cpu_name, gpt2_shapes, interleave, make_params
from overhead_device import WORKLOADS as DEVICE_WORKLOADS
from overhead_device import measure_device
from overhead_sharded import measure_sharded
from overhead_thread import measure_small_models, measure_thread
from overhead_training import measure_training

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the table of optimizers

from family import FAMILY

from xgrad_optim import XAdamW, XGrad, available_backends
from xgrad_optim.optimizer import XGradOptimizer

Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS = ("step", "any", "thread", "bf16", "small", "sharded", "training", "memory", "bandwidth")

MEASURED = list({member.rule.name: member for member in FAMILY}.values())
"""One optimizer of each rule."""

WORKLOADS = {
    "gpt2-small": gpt2_shapes(768, 12),
    "tiny": gpt2_shapes(128, 2, vocabulary=5000, context=256),
}


@dataclass(frozen=True)
class Contender:
    """One optimizer in one configuration; `peer` names the contender that it is compared with."""

    name: str
    make: Make
    bytes_per_element: int
    peer: str | None = None


def contenders(peer: type[torch.optim.Optimizer]) -> list[Contender]:
    """This class of torch.optim, and of each rule that moves the same bytes one optimizer of ours."""
    members = [member for member in MEASURED if member.peer is peer]
    size, make_peer = members[0].bytes_per_element, members[0].make_peer
    found = [
        Contender(f"{peer.__name__} {how}", lambda params, how=how: make_peer(params, **{how: True}), size)
        for how in ("foreach", "fused")
    ]
    for backend, how in our_backends().items():
        for member in members:
            for steps in (1, 0) if member.is_base else (1,):
                make: Make = lambda params, cls=member.cls, steps=steps, backend=backend: cls(  # noqa: E731
                    params, prediction_steps=steps, backend=backend
                )
                found.append(Contender(f"{member.name} {backend} s={steps}", make, size, f"{peer.__name__} {how}"))
    return found


def our_backends() -> dict[str, str]:
    """The back ends that can run CPU tensors here, with the kind of torch.optim that each is measured against."""
    reasons = available_backends()
    return {name: peer for name, peer in (("cpu", "fused"), ("torch", "foreach")) if reasons[name] is None}


def compare(report: Report, title: str, contenders: list[Contender], make: Callable, rounds: int) -> None:
    """Time a step of each contender on parameters of its own."""
    steps, elements = {}, 0
    for contender in contenders:
        params = make()
        elements = sum(param.numel() for param in params)
        steps[contender.name] = contender.make(params).step
    seconds = interleave(steps, rounds)
    rows: list[list[object]] = []
    for contender in contenders:
        own = seconds[contender.name]
        low, middle, high = (float(numpy.quantile(own, q)) * 1e3 for q in (0.2, 0.5, 0.8))
        ratio: object = "" if contender.peer is None else middle / (statistics.median(seconds[contender.peer]) * 1e3)
        rate = contender.bytes_per_element * elements / (middle * 1e-3) / 1e9
        rows.append([contender.name, middle, low, high, ratio, contender.peer or "", rate])
    report.table(title, ["optimizer", "ms", "20 %", "80 %", "ratio", "to", "GB/s"], rows)
    for member in MEASURED:
        for backend in our_backends():
            pair = [seconds.get(f"{member.name} {backend} s={steps}") for steps in (1, 0)]
            if all(pair):
                predicting, plain = map(statistics.median, pair)
                print(f"{member.name} {backend}: s=1 over s=0 {predicting / plain:.3f}")


def section_step(report: Report, shapes: list[tuple[int, ...]], rounds: int) -> None:
    for peer in dict.fromkeys(member.peer for member in reversed(MEASURED)):
        title = f"a step beside {peer.__name__}, float32"
        compare(report, title, contenders(peer), lambda: make_params(shapes), rounds)


WRAPPED: dict[str, Make] = {
    "SGD fused": lambda params: torch.optim.SGD(params, momentum=0.9, fused=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "NAdam foreach": lambda params: torch.optim.NAdam(params, foreach=True),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "Muon": lambda params: torch.optim.Muon([param for param in params if param.dim() == 2]),
}
"""Bases that XGrad is measured around. The embeddings stay with Muon here, for which it is not meant."""


def section_any(report: Report, shapes: list[tuple[int, ...]], rounds: int) -> None:
    """XGrad around a base, beside the base itself: the processor's time, and what both hold for each parameter."""
    rows: list[list[object]] = []
    for name, make in WRAPPED.items():
        base, wrapper = make(make_params(shapes)), XGrad(make(make_params(shapes)))
        seconds = interleave({"base": base.step, "wrapped": wrapper.step}, rounds, clock=time.process_time)
        plain, predicting = (statistics.median(seconds[each]) * 1e3 for each in ("base", "wrapped"))
        rows.append([name, plain, predicting, predicting / plain, held_bytes(base), held_bytes(wrapper)])
    columns = ["base", "ms", "XGrad, ms", "ratio", "bytes", "XGrad, bytes"]
    report.table("XGrad around any optimizer, CPU time", columns, rows)


def held_bytes(optimizer: torch.optim.Optimizer) -> float:
    """For each element of the parameters: weights, gradients and state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    held = [*params, *(param.grad for param in params), *(value for value in states if isinstance(value, torch.Tensor))]
    return sum(tensor.nbytes for tensor in held) / sum(param.numel() for param in params)


def section_bf16(report: Report, shapes: list[tuple[int, ...]], rounds: int) -> None:
    """bfloat16 parameters and gradients with float32 master weights and state: 28 bytes per element as well."""
    for backend in our_backends():
        full, half = make_params(shapes), make_params(shapes, torch.bfloat16)
        calls = {
            "float32": XAdamW(full, backend=backend).step,
            "bfloat16 + master": XAdamW(half, backend=backend, master_weights=True).step,
        }
        medians = {name: statistics.median(times) for name, times in interleave(calls, rounds).items()}
        # The torch back end reads the parameter beside its master weights in every step.
        moved = {"float32": 28, "bfloat16 + master": 2 + 2 + 3 * 8 + (2 if backend == "torch" else 0)}
        rows = [[name, moved[name], median * 1e3, median / medians["float32"]] for name, median in medians.items()]
        report.table(f"XAdamW {backend}, mixed precision", ["parameters", "bytes/element", "ms", "ratio"], rows)


def section_small(report: Report, rounds: int) -> None:
    """Small models; then many tensors of 64 elements: what a step costs per tensor, as a line through four counts."""
    measure_small_models(report, list(our_backends()), 5 * rounds)
    counts = (10, 100, 1000, 10000)
    makers: dict[str, Make] = {"AdamW fused": lambda params: torch.optim.AdamW(params, fused=True)}
    for backend in our_backends():
        makers[f"XAdamW {backend}"] = lambda params, backend=backend: XAdamW(params, backend=backend)
    for in_a_row, title in ((10, "steps in a row"), (1, "each step after the others' (cold caches)")):
        times: dict[str, list[float]] = {name: [] for name in makers}
        for count in counts:
            steps = {name: make(make_params([(64,)] * count)).step for name, make in makers.items()}
            for name, seconds in interleave(steps, (1 if in_a_row > 1 else 5) * rounds, in_a_row=in_a_row).items():
                times[name].append(statistics.median(seconds) * 1e6)
        rows: list[list[object]] = []
        for name, medians in times.items():
            # Weighted by 1 / time: a least-squares line through equal relative errors.
            slope, intercept = numpy.polyfit(counts, medians, 1, w=1 / numpy.array(medians))
            rows.append([name, *medians, float(slope), float(intercept), medians[2] / times["AdamW fused"][2]])
        columns = ["optimizer", *(f"us, {count}" for count in counts), "us/tensor", "us/step", "ratio at 1000"]
        report.table(f"tensors of 64 elements, {title}", columns, rows)


MEMORY_CASES: dict[str, Make] = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    **{
        f"XAdamW {backend} s={steps}": lambda params, backend=backend, steps=steps: XAdamW(
            params, backend=backend, prediction_steps=steps
        )
        for backend in ("cpu", "torch")
        for steps in (1, 0)
    },
}


def peak_resident() -> int:
    """The highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss down from the parent process, VmHWM is our own
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes(name: str, shapes: list[tuple[int, ...]]) -> int:
    """Peak resident memory of three steps of this optimizer over that of parameters and gradients alone."""
    params = make_params(shapes)
    before = peak_resident()
    optimizer = MEMORY_CASES[name](params)
    for _ in range(3):
        optimizer.step()
    if isinstance(optimizer, XGradOptimizer):
        optimizer.eval()
        optimizer.train()
    return peak_resident() - before


def section_memory(report: Report, workload: str) -> None:
    """Each optimizer in a process of its own, where the peak of the resident memory is its own."""
    elements = sum(numpy.prod(shape, dtype=int) for shape in WORKLOADS[workload])
    rows: list[list[object]] = []
    for name in MEMORY_CASES:
        if name.startswith("XAdamW") and name.split()[1] not in our_backends():
            continue
        command = [sys.executable, __file__, "--peak-of", name, "--workload", workload]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append([name, peak / 2**20, peak / elements])
    report.table("peak memory of state and step", ["optimizer", "MiB", "bytes/element"], rows)


def section_bandwidth(report: Report, shapes: list[tuple[int, ...]], rounds: int) -> None:
    """The rate of a step beside that of the simplest memory-bound operations, in one run."""
    elements = sum(numpy.prod(shape, dtype=int) for shape in shapes)
    x, y, z = (torch.randn(int(elements)) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        "in-place multiply": lambda: x.mul_(0.999),
        "triad": lambda: torch.add(x, y, alpha=0.5, out=z),
    }
    moved = {"in-place multiply": 8, "triad": 12}
    for backend in our_backends():
        calls[f"XAdamW {backend}"] = XAdamW(make_params(shapes), backend=backend).step
        moved[f"XAdamW {backend}"] = 28
    medians = {name: statistics.median(seconds) for name, seconds in interleave(calls, rounds).items()}
    rates = {name: moved[name] * elements / median / 1e9 for name, median in medians.items()}
    rows: list[list[object]] = [
        [name, moved[name], rate, rate / rates["in-place multiply"]] for name, rate in rates.items()
    ]
    report.table("share of the memory bandwidth", ["operation", "bytes/element", "GB/s", "share"], rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; default all")
    names = list(dict.fromkeys([*WORKLOADS, *DEVICE_WORKLOADS]))
    parser.add_argument("--workload", choices=names, default=None, help="default gpt2-small; with --device, all of its")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contender (default 9)")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers there, one JSON object a line")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="the tables of a device in their place")
    parser.add_argument("--scale", type=float, default=1.0, help="with --device: so much of each model (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="with --device: folder for JSON lines and plot")
    parser.add_argument("--seconds", type=float, default=math.inf, help="with --device: begin nothing after that time")
    parser.add_argument("--peak-of", choices=MEMORY_CASES, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {sorted(unknown)[0]!r} (choose from {', '.join(SECTIONS)})")
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--rounds and --threads must be at least 1")
    if not 0 < options.scale <= 1:
        parser.error("--scale must be above 0 and at most 1")
    known = WORKLOADS if options.device is None else DEVICE_WORKLOADS
    if options.workload is not None and options.workload not in known:
        parser.error(f"--workload {options.workload} does not belong to these tables (choose from {', '.join(known)})")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.device is not None:
        names = [options.workload] if options.workload else list(DEVICE_WORKLOADS)
        try:
            measure_device(options.device, names, options.scale, options.rounds, options.out, options.seconds)
        except RuntimeError as error:
            sys.exit(f"--device {options.device}: {error}")
        return
    options.workload = options.workload or "gpt2-small"
    shapes = WORKLOADS[options.workload]
    if options.peak_of:
        print(peak_bytes(options.peak_of, shapes))
        return
    report = Report(cpu_name())
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.workload}")
    sections: dict[str, Callable[[], None]] = {
        "step": lambda: section_step(report, shapes, options.rounds),
        "any": lambda: section_any(report, shapes, options.rounds),
        "thread": lambda: measure_thread(report, options.rounds),
        "bf16": lambda: section_bf16(report, shapes, options.rounds),
        "small": lambda: section_small(report, options.rounds),
        "sharded": lambda: measure_sharded(report, 5 * options.rounds),
        "training": lambda: measure_training(report, 3 * options.rounds),
        "memory": lambda: section_memory(report, options.workload),
        "bandwidth": lambda: section_bandwidth(report, shapes, options.rounds),
    }
    for name in options.sections or SECTIONS:
        sections[name]()
    if options.json:
        report.save(options.json)


if __name__ == "__main__":
    main()
