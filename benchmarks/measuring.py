"""What the benchmarks share: shapes of models, parameters, and a report that prints tables and keeps their numbers."""

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import xgrad_optim

Shapes = list[tuple[int, ...]]


def gpt2_shapes(width: int, layers: int, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """The parameter shapes of GPT-2: 148 tensors, 124 million elements, at width 768 and 12 layers."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + mlp) * layers, *norm]


def resnet50_shapes() -> Shapes:
    """161 tensors, 25.6 million elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, channels, 1, 1)] * (block == 0)  # the shortcut
            for convolution in convolutions:
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def llama_shapes(width: int = 2048, layers: int = 16, hidden: int = 8192, keys: int = 512) -> Shapes:
    """Like Llama 3.2 1B, embeddings tied: 146 tensors, 1.24 billion elements."""
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    layer = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(128256, width), *layer * layers, (width,)]


def make_params(shapes: Shapes, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    """Parameters with gradients, both random and never zero."""
    params = [torch.randn(shape, device=device).mul_(0.02).to(dtype).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, device=device).mul_(0.01).to(dtype)
    return params


def interleave(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    in_a_row: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round; the order turns from round to round. `prepare` runs before each, untimed.

    Calls in a row find in the caches what the one before has left there; it is one call more, which is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(warmup + rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            prepare(name)
            if in_a_row > 1:
                calls[name]()
            start = clock()
            for _ in range(in_a_row):
                calls[name]()
            if index >= warmup:
                seconds[name].append((clock() - start) / in_a_row)
    return seconds


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class Report:
    """Prints tables and keeps the numbers for the JSON; the facts in `more` are repeated in each of its lines."""

    def __init__(self, machine: str, **more: object) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 140)
        self.rows: list[dict[str, object]] = []
        self._header = {
            "xgrad_optim": xgrad_optim.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": machine,
            "threads": torch.get_num_threads(),
            **more,
        }

    def table(self, title: str, columns: list[str], rows: list[list[object]]) -> None:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(_shown, row))
            self.rows.append({"table": title, **dict(zip(columns, row, strict=True))})
        self.console.print(table)

    def save(self, path: Path) -> None:
        partial = path.with_name(path.name + ".part")
        partial.write_text("".join(json.dumps({**self._header, **row}) + "\n" for row in self.rows), encoding="utf-8")
        partial.replace(path)

    def save_markdown(self, path: Path, title: str, subtitle: str) -> None:
        """All tables; columns without a number anywhere are left out."""
        facts = ", ".join(f"{name} {value}" for name, value in self._header.items())
        lines = [f"# {title}", "", f"{subtitle}. {facts}.", ""]
        for name in dict.fromkeys(row["table"] for row in self.rows):
            rows = [{key: row[key] for key in row if key != "table"} for row in self.rows if row["table"] == name]
            columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
            lines += [f"## {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(_shown(row[key]) for key in columns)} |" for row in rows] + [""]
        path.write_text("\n".join(lines), encoding="utf-8")


def _shown(cell: object) -> str:
    return "-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
