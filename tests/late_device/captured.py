"""An optimizer on the late device whose steps are replays of a graph, and its twin on the CPU."""

from typing import Any

import torch
from twins import same_bits

from late_device import device
from late_device.device import NAME
from late_device.twins import Make, gradients, parameters, upload

LRS = (0.01, 0.02, 0.03, 0.5, 0.0, 0.01)
"""Of each step in turn."""


class Captured:
    """An optimizer on the device whose steps are replays of one graph, and its twin on the CPU.

    Attributes:
        static: the gradients that the graph reads.
    """

    def __init__(self, make: Make, dtype: torch.dtype = torch.float32, backend: str = "triton", **options: Any) -> None:
        self.lr = upload(torch.tensor(LRS[0], dtype=torch.float64))
        self.host = parameters(dtype)
        self.late = [torch.nn.Parameter(upload(param.detach())) for param in self.host]
        self.static = [torch.zeros_like(param) for param in self.late]
        self.host_optimizer = make(self.host, lr=LRS[0], backend="cpu", **options)
        self.late_optimizer = make(self.late, lr=self.lr, backend=backend, capturable=True, **options)

    def warm_up(self, steps: int = 2) -> None:
        """Eager steps on a side stream, as CUDA graphs want it."""
        side = torch.Stream(device=NAME)
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            for step in range(steps):
                self.eager_step(step)
        torch.accelerator.current_stream().wait_stream(side)

    def capture(self) -> device.Graph:
        self.use_static_gradients()
        with device.capture() as graph:
            self.late_optimizer.step()
        return graph

    def use_static_gradients(self) -> None:
        for param, grad in zip(self.late, self.static, strict=True):
            param.grad = grad

    def eager_step(self, step: int, moves_gradients: bool = False) -> None:
        self.set_lr(step)
        self.fill(step)
        if moves_gradients:
            for param, grad in zip(self.late, self.static, strict=True):
                param.grad = grad.clone()
        else:
            self.use_static_gradients()
        self.late_optimizer.step()
        self.host_step(step)

    def replayed_step(self, step: int, graph: device.Graph) -> None:
        self.set_lr(step)
        self.fill(step)
        graph.replay()
        self.host_step(step)

    def set_lr(self, step: int) -> None:
        self.lr.fill_(LRS[step % len(LRS)])
        self.host_optimizer.param_groups[0]["lr"] = LRS[step % len(LRS)]

    def fill(self, step: int) -> None:
        for static, grad in zip(self.static, gradients(self.host, step), strict=True):
            static.copy_(upload(grad))

    def host_step(self, step: int) -> None:
        for param, grad in zip(self.host, gradients(self.host, step), strict=True):
            param.grad = grad
        self.host_optimizer.step()

    def check(self, where: str) -> None:
        for index, (late, host) in enumerate(zip(self.late, self.host, strict=True)):
            assert same_bits(late, host), f"parameter {index} {where}"
