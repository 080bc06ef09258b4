"""The same training on the late device and on the CPU, compared bit by bit at the end: nothing waits in between."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from twins import same_bits

from late_device import device
from late_device.device import NAME

SIZES = (700, 65, 0, 3)
"""Elements of each parameter: more than a block with a tail, one block, none, a few."""

Make = Callable[..., torch.optim.Optimizer]


def upload(values: Tensor) -> Tensor:
    """On the device when its stream runs; the pinned memory is free when it has."""
    return values.pin_memory().to(NAME, non_blocking=True)


def parameters(dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES) -> list[torch.nn.Parameter]:
    """On the CPU, the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """On the CPU; each step has its own."""
    generator = torch.Generator().manual_seed(100 + step)
    scale = 10.0 ** (1 - step % 3)
    return [(scale * torch.randn(param.shape, generator=generator)).to(param.dtype) for param in params]


class Twins:
    """An optimizer on the device and its twin on the CPU, and what both had at each look.

    Attributes:
        late, host: the parameters.
        late_optimizer, host_optimizer: backend="triton" unless told, and backend="cpu".
    """

    def __init__(self, make: Make, dtype: torch.dtype = torch.float32, backend: str = "triton", **options: Any) -> None:
        self.host = parameters(dtype)
        self.late = [torch.nn.Parameter(upload(param.detach())) for param in self.host]
        on_host = {name: value for name, value in options.items() if name != "capturable"}  # which needs a GPU
        self.host_optimizer = make(self.host, backend="cpu", **on_host)
        self.late_optimizer = make(self.late, backend=backend, **options)
        self._looks: list[tuple[str, list[Tensor], list[Tensor]]] = []

    @property
    def optimizers(self) -> tuple[Any, Any]:
        return self.late_optimizer, self.host_optimizer

    def step(self, step: int, deliver: "Delivery", without: int | None = None) -> None:
        """One step of both; `without`: a parameter that has no gradient in it."""
        grads: list[Tensor | None] = list(gradients(self.host, step))
        if without is not None:
            grads[without] = None
        for param, grad in zip(self.host, grads, strict=True):
            param.grad = grad
        self.host_optimizer.step()
        deliver(self.late_optimizer, self.late, grads)

    def do(self, action: Callable[[Any], object]) -> None:
        for optimizer in self.optimizers:
            action(optimizer)

    def look(self, name: str) -> None:
        """Note what the parameters hold, without waiting for it."""
        late, host = ([param.detach().clone() for param in params] for params in (self.late, self.host))
        self._looks.append((name, late, host))

    def check(self) -> None:
        """Wait, then compare all that was looked at, the parameters and the state."""
        self.look("the end")
        device.synchronize()
        for name, late, host in self._looks:
            for index, pair in enumerate(zip(late, host, strict=True)):
                assert same_bits(*pair), f"parameter {index} at {name}"
        states = ([optimizer.state[param] for param in params] for optimizer, params in self.optimized())
        for index, (late_state, host_state) in enumerate(zip(*states, strict=True)):
            assert late_state.keys() == host_state.keys()
            for key, value in late_state.items():
                assert same_bits(value, host_state[key]), f"{key} of parameter {index}"

    def optimized(self) -> Iterator[tuple[Any, list[torch.nn.Parameter]]]:
        for optimizer in self.optimizers:
            yield optimizer, [param for group in optimizer.param_groups for param in group["params"]]


# -- how gradients come to the device, and steps run on it -------------------------------------------------------------

Delivery = Callable[[Any, list[torch.nn.Parameter], Sequence[Tensor | None]], None]


def set_gradients(params: list[torch.nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    """New tensors; the old ones' memory is free for them, as nobody waits."""
    for param in params:
        param.grad = None
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else upload(grad)


class OneStream:
    def __call__(self, optimizer: Any, params: Any, grads: Any) -> None:
        set_gradients(params, grads)
        optimizer.step()


class ChangingStreams:
    """Every step runs on another stream, after the last one."""

    def __init__(self) -> None:
        self._streams = [torch.accelerator.current_stream(), *(torch.Stream(device=NAME) for _ in range(2))]
        self._last = self._streams[0]

    def __call__(self, optimizer: Any, params: Any, grads: Any) -> None:
        index = self._streams.index(self._last)
        stream = self._streams[(index + 1) % len(self._streams)]
        stream.wait_stream(self._last)
        with stream:
            set_gradients(params, grads)
            optimizer.step()
        self._last = stream
        torch.accelerator.current_stream().wait_stream(stream)


class SideStreams:
    """Gradients come on a stream of their own, the step waits for them."""

    def __init__(self) -> None:
        self._side = torch.Stream(device=NAME)

    def __call__(self, optimizer: Any, params: Any, grads: Any) -> None:
        main = torch.accelerator.current_stream()
        with self._side:
            set_gradients(params, grads)
        main.wait_stream(self._side)
        optimizer.step()
        for param in params:
            if param.grad is not None:
                param.grad.record_stream(main)


class Freed:
    """Gradients are freed right after the step, and strangers take their memory before it has run."""

    def __init__(self) -> None:
        self._strangers: list[Tensor] = []

    def __call__(self, optimizer: Any, params: Any, grads: Any) -> None:
        OneStream()(optimizer, params, grads)
        for param in params:
            param.grad = None
        self._strangers = [torch.full_like(param, 7.0) for param in params for _ in range(2)]

    def check(self) -> None:
        assert all(bool((stranger.cpu() == 7.0).all()) for stranger in self._strangers)


DELIVERIES: dict[str, type] = {
    "one stream": OneStream,
    "changing streams": ChangingStreams,
    "side streams": SideStreams,
    "freed gradients": Freed,
}


def train(twins: Twins, deliver: Delivery, steps: int = 5) -> device.Counts:
    """Steps with a changing lr, a missing gradient, swaps between them and a step from evaluation mode.

    Returns what the device was asked for; nothing has waited.
    """
    with device.counting() as counts:
        for step in range(steps):
            twins.step(step, deliver, without=1 if step == 1 else None)
            twins.look(f"step {step}")
            for group in (group for optimizer in twins.optimizers for group in optimizer.param_groups):
                group["lr"] *= 0.7
            if step in (0, 2):
                twins.do(lambda optimizer: optimizer.eval())
                twins.look(f"evaluation {step}")
            if step == 2:
                twins.do(lambda optimizer: optimizer.train())
                twins.look(f"training {step}")
    return counts
