"""What records, fakes or transforms torch's operations: a swap stays out of it, a step refuses to run inside.

A recorded swap would run again with every call of the trace; a faked or transformed one would not reach the weights.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _set_tracing_state  # type: ignore[attr-defined]
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")


def untraced(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that torch.compile leaves alone; with fullgraph=True, and in torch.export, it raises with the reason.

    As torch.compiler.disable, which can't be used here, for it imports the compiler at once.
    """

    def disable(function: Callable[P, R]) -> Callable[P, R]:
        disabled: Any = torch._disable_dynamo(function)
        disabled._torchdynamo_disable, disabled._torchdynamo_disable_msg = True, reason
        return disabled

    return disable


def is_any() -> bool:
    """Whether operations go to anybody but the kernels: a tracer, a transform of torch.func, a mode."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._get_tracing_state()
    )


@contextmanager
def outside() -> Iterator[None]:
    """No tracer, transform or mode sees what runs inside the block."""
    with ExitStack() as stack:
        stack.callback(_set_tracing_state, torch._C._get_tracing_state())
        _set_tracing_state(None)
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C._DisableFuncTorch())
        yield


def of_steps(params: Iterable[Tensor]) -> str | None:
    """What these parameters can't be stepped inside of, by name; None where they can.

    Modes that only watch may watch a step, and parameters that a FakeTensorMode has made may be stepped in it.
    """
    if torch._C._get_tracing_state():
        return "torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack():
        return "a transform of torch.func"
    if not torch._C._len_torch_dispatch_stack() and not _len_torch_dispatch_stack_pre_dispatch():
        return None
    with _disable_current_modes() as modes:
        names = {type(mode).__name__ for mode in modes if mode.is_infra_mode()}
    return next(iter(names - {"FakeTensorMode"} if are_fake(params) else names), None)


def are_fake(params: Iterable[Tensor]) -> bool:
    """Whether they have no data, so that whatever is done to them belongs into their FakeTensorMode."""
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(param, FakeTensor) for param in params)
