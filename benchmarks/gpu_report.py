"""What the GPU kernels are made of, read from their machine code; no GPU is needed, and nothing here is a time.

For each back end, architecture and kind of launch: registers, bytes of local memory (spilled registers), bytes that
the main loop loads and stores for an element, the widths of its accesses, and its instructions for an element.

    python benchmarks/gpu_report.py           steps and swaps as they are commonly used
    python benchmarks/gpu_report.py --all     every variant that exists; takes many minutes
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # its helpers compile the kernels and read machine code

import cuda_kernels  # noqa: E402
from family import RULES  # noqa: E402
from machine_code import ARCHITECTURES, REASON, MachineCode, kernels_of  # noqa: E402
from random_launch import Variant, every_variant  # noqa: E402

from xgrad_optim import backends  # noqa: E402
from xgrad_optim.backends import build_cuda  # noqa: E402


@dataclass(frozen=True)
class Line:
    """One kernel of one back end on one architecture."""

    backend: str
    architecture: str
    rule: str
    launch: str
    parameters: str
    state: str
    buffers: str
    registers: int
    local_bytes: int
    bytes_per_element: float
    widths: str
    instructions_per_element: float
    issue_slots_per_byte: float
    without_restore: float


def common_variants(rule: str) -> list[Variant]:
    """Steps as most models take them, and the swap of float32."""
    full, half, double = torch.float32, torch.bfloat16, torch.float64
    variants = [
        Variant(rule, full, full, has_grad=True),
        Variant(rule, full, full, has_grad=False),
        Variant(rule, full, full, has_grad=True, has_optional=True),
        Variant(rule, half, full, has_grad=True, has_master_weights=True),
        Variant(rule, half, half, has_grad=True),
        Variant(rule, double, double, has_grad=True),
    ]
    return [variant for variant in variants if variant in every_variant(rule)]


def describe(backend: str, architecture: str, variant: Variant, code: MachineCode) -> Line:
    loads, stores = (code.widths(kind, code.main_loop) for kind in ("LD", "ST"))
    moved = sum(width * count for widths in (loads, stores) for width, count in widths.items())
    # The loop may be unrolled: how many elements of each buffer it stores tells how many it is for.
    elements = sum(width * count for width, count in stores.items()) / sum(variant.operands()[1])
    buffers = {"max_exp_avg_sq": variant.has_optional, "master_weights": variant.has_master_weights}
    return Line(
        backend=backend,
        architecture=architecture,
        rule=variant.rule,
        launch="step" if variant.has_grad else "swap",
        parameters=str(variant.dtype).removeprefix("torch."),
        state=str(variant.state_dtype).removeprefix("torch."),
        buffers=" ".join(name for name, is_there in buffers.items() if is_there),
        registers=code.registers,
        local_bytes=code.stack,
        bytes_per_element=moved / elements,
        widths=" ".join(f"{count}x{width}" for width, count in sorted((loads + stores).items(), reverse=True)),
        instructions_per_element=len(code.main_loop) / elements,
        issue_slots_per_byte=code.issue_slots(restores=True) / moved,
        without_restore=code.issue_slots(restores=False) / moved,
    )


def cuda_lines(variants: list[Variant]) -> Iterator[Line]:
    rules = sorted({variant.rule for variant in variants})
    pairs = [(rule, architecture) for rule in rules for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as compilers:
        cubins = dict(zip(pairs, compilers.map(lambda pair: cuda_kernels.compiled(*pair), pairs), strict=True))
    for variant in variants:
        for architecture in ARCHITECTURES:
            code = kernels_of(cubins[variant.rule, architecture])[cuda_kernels.symbol_of(variant)]
            yield describe("cuda", architecture, variant, code)


def triton_lines(variants: list[Variant]) -> Iterator[Line]:
    from triton_kernels import compile_step

    with tempfile.TemporaryDirectory() as scratch:
        for number, variant in enumerate(variants):
            for architecture in ARCHITECTURES:
                cubin = Path(scratch) / f"{number}-{architecture}.cubin"
                cubin.write_bytes(compile_step(variant, architecture).asm["cubin"])
                (code,) = kernels_of(cubin).values()
                yield describe("triton", architecture, variant, code)


TITLE = """# The GPU kernels' machine code

Made by `make gpu-report`, without a GPU. Bytes, widths (accesses x bytes of a thread) and instructions are those of the
main loop; the rare cases of divisions and roots are outside of it. Issue slots are the instructions that a thread
executes, without these rare cases; without_restore: where there is no prediction to undo, as with prediction_steps=0.

A GPU that gives its threads fewer slots for a byte of its memory than a kernel needs is bound by instructions there:
"""

SLOTS = {"H100 SXM": (132, 1.755e9, 3.35e12), "H200": (132, 1.755e9, 4.8e12), "B200": (148, 1.85e9, 8.0e12)}
"""Multiprocessors, each of which issues 4 instructions of 32 threads at once; clock; bytes of memory per second."""


def legend() -> str:
    rows = [f"| {name} | {n * 128 * clock / bandwidth:.1f} |\n" for name, (n, clock, bandwidth) in SLOTS.items()]
    return "\n| GPU | issue slots per byte |\n| --- | --- |\n" + "".join(rows) + "\n"


def markdown(lines: list[Line]) -> str:
    names = list(asdict(lines[0]))
    rows = [names, ["---"] * len(names)]
    for line in lines:
        rows.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in asdict(line).values()])
    return TITLE + legend() + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write into")
    options = parser.parse_args(argv)
    if REASON is not None:
        sys.exit(REASON)
    choose = every_variant if options.all else common_variants
    variants = [variant for rule in RULES for variant in choose(rule)]
    lines: list[Line] = []
    try:
        build_cuda.find_nvcc()
        lines += cuda_lines(variants)
    except RuntimeError as error:
        print(f"no lines of the CUDA back end: {error}", file=sys.stderr)
    if isinstance(reason := backends._module("triton"), str):
        print(f"no lines of the Triton back end: {reason}", file=sys.stderr)
    else:
        lines += triton_lines(variants)
    if not lines:
        sys.exit("there is nothing to report on")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_kernels.md").write_text(markdown(lines), encoding="utf-8")
    (options.out / "gpu_kernels.json").write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    spilling = sum(line.local_bytes > 0 for line in lines)
    print(f"{len(lines)} kernels, {spilling} of them spill, written to {options.out / 'gpu_kernels.md'}")


if __name__ == "__main__":
    main()
