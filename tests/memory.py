"""How many bytes the process grows by in each round of what a training does; a script, for a process of its own."""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import nn

from xgrad_optim import XAdamW

WINDOWS = 3
"""A leak shows in each of them, the allocator's own growth does not."""
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def rounds(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is repeated, by name; each leaves the optimizer ready for the others."""
    model = nn.Linear(2, 2)
    optimizer = XAdamW(model.parameters(), backend=backend)
    x = torch.ones(1, 2)
    model(x).sum().backward()
    optimizer.step()

    def swap():
        optimizer.eval()
        optimizer.train()

    def fresh_gradients():
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    def attach():
        optimizer.attach(model).remove()

    def reload():
        optimizer.load_state_dict(optimizer.state_dict())

    def block():
        with optimizer.true_weights():
            pass

    yield "step", optimizer.step
    yield "swap", swap
    yield "true_weights", block
    yield "fresh gradients", fresh_gradients
    yield "load_state_dict", reload
    yield "attach and remove", attach
    handle = optimizer.attach(model)
    yield "attached forwards", lambda: (model.eval()(x), model.train()(x))
    handle.remove()


def growth(backend: str, n: int) -> dict[str, float]:
    """Bytes for each round of `n`, in the best of the windows that follow a warm-up."""
    grown = {}
    for name, act in rounds(backend):
        sizes = [_resident_after(act, n) for _ in range(1 + WINDOWS)]
        grown[name] = min(after - before for before, after in pairwise(sizes)) / n
    return grown


def _resident_after(act: Callable[[], object], n: int) -> int:
    for _ in range(n):
        act()
    return resident()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(growth(sys.argv[1], int(sys.argv[2]))))
