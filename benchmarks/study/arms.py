"""What is compared: optimizers with their options, in families that share a grid of learning rates."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

sys.path.append(str(Path(__file__).resolve().parent))

from comparators import QHM, EMANesterov, Lookahead, QHAdam

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW, XGrad

Params = Iterable[Tensor]


@dataclass(frozen=True)
class Arm:
    """One optimizer with its options.

    Attributes:
        family: arms of one family are compared with each other, and share the grids of learning rates.
        make: `(params, lr) -> Optimizer`.
        is_scheduled: False where the method has no decay of its learning rate: a warm-up only.
    """

    family: str
    make: Callable[..., Optimizer]
    is_scheduled: bool = True


def _around_adamw(wrapper: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    return lambda params, lr: wrapper(torch.optim.AdamW(params, lr=lr))


def _schedule_free(params: Params, lr: float) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, lr=lr, weight_decay=0.01)
    optimizer.train()
    return optimizer


def _muon(params: Params, lr: float, s: float | None) -> Optimizer:
    """Muon for matrices, AdamW for the rest, as Muon is used."""
    params = list(params)
    matrices = [param for param in params if param.ndim == 2]
    rest = [param for param in params if param.ndim != 2]
    bases = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01)] if matrices else []
    bases += [torch.optim.AdamW(rest, lr=lr)] if rest else []
    return Several(bases if s is None else [XGrad(base, prediction_steps=s) for base in bases])


def _lion(params: Params, lr: float, s: float | None) -> Optimizer:
    from lion_pytorch import Lion

    base = Lion(params, lr=lr, weight_decay=0.01)
    return base if s is None else XGrad(base, prediction_steps=s)


class Several(Optimizer):
    """Optimizers of different parameters, stepped as one."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        super().__init__([param for part in parts for group in part.param_groups for param in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for part in self.parts:
            part.step()

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(true_weights(part))
            yield


def _sgd(params: Params, lr: float, **options: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, **{"momentum": 0.9, **options})


def _adamw(params: Params, lr: float, beta1: float = 0.9) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, betas=(beta1, 0.999))


def _xadamw(params: Params, lr: float, s: float, beta1: float = 0.9, **options: Any) -> Optimizer:
    return XAdamW(params, lr=lr, betas=(beta1, 0.999), prediction_steps=s, **options)


def _nadamw(params: Params, lr: float) -> Optimizer:
    return torch.optim.NAdam(params, lr=lr, weight_decay=0.01, decoupled_weight_decay=True)


ARMS = {
    "adamw": Arm("adamw", _adamw),
    "xadamw s=1": Arm("adamw", partial(_xadamw, s=1.0)),
    "xadamw .8 s=.5": Arm("adamw", partial(_xadamw, s=0.5, beta1=0.8)),
    "adamw .8": Arm("adamw", partial(_adamw, beta1=0.8)),
    "nadamw": Arm("adamw", _nadamw),
    "adamw .6": Arm("adamw", partial(_adamw, beta1=0.6)),
    "adamw .95": Arm("adamw", partial(_adamw, beta1=0.95)),
    "xadamw s=.5": Arm("adamw", partial(_xadamw, s=0.5)),
    "xadamw s=2": Arm("adamw", partial(_xadamw, s=2.0)),
    "xadamw .8 s=1": Arm("adamw", partial(_xadamw, s=1.0, beta1=0.8)),
    "xadamw .6 s=.25": Arm("adamw", partial(_xadamw, s=0.25, beta1=0.6)),
    "qhadam": Arm("adamw", QHAdam),
    "schedule-free": Arm("adamw", _schedule_free, is_scheduled=False),
    "ema-nesterov": Arm("adamw", _around_adamw(EMANesterov)),
    "lookahead": Arm("adamw", _around_adamw(Lookahead)),
    "sgdm": Arm("sgdm", _sgd),
    "xsgdm s=1": Arm("sgdm", partial(XSGDM, momentum=0.9, prediction_steps=1.0)),
    "nesterov": Arm("sgdm", partial(_sgd, nesterov=True)),
    "sgdm .6": Arm("sgdm", partial(_sgd, momentum=0.6)),
    "sgdm .8": Arm("sgdm", partial(_sgd, momentum=0.8)),
    "sgdm .95": Arm("sgdm", partial(_sgd, momentum=0.95)),
    "xsgdm s=.5": Arm("sgdm", partial(XSGDM, momentum=0.9, prediction_steps=0.5)),
    "xsgdm s=2": Arm("sgdm", partial(XSGDM, momentum=0.9, prediction_steps=2.0)),
    "xsgdm .8 s=.5": Arm("sgdm", partial(XSGDM, momentum=0.8, prediction_steps=0.5)),
    # lr / (1 - beta) is what one gradient moves in the end: QHM's lr has that factor in it.
    "qhm": Arm("sgdm", lambda params, lr: QHM(params, lr=10 * lr)),
    "adam": Arm("adam", torch.optim.Adam),
    "xadam s=1": Arm("adam", partial(XAdam, prediction_steps=1.0)),
    "adabelief": Arm("adabelief", partial(XAdaBelief, prediction_steps=0.0)),
    "xadabelief s=1": Arm("adabelief", partial(XAdaBelief, prediction_steps=1.0)),
    "adam3": Arm("adam3", partial(XAdaM3, prediction_steps=0.0)),
    "xadam3 s=1": Arm("adam3", partial(XAdaM3, prediction_steps=1.0)),
    "muon": Arm("muon", partial(_muon, s=None)),
    "xgrad(muon) s=1": Arm("muon", partial(_muon, s=1.0)),
    "lion": Arm("lion", partial(_lion, s=None)),
    "xgrad(lion) s=1": Arm("lion", partial(_lion, s=1.0)),
    # In low precision; torch's own, and ours with and without a master copy.
    "adamw bf16 master": Arm("adamw", partial(_xadamw, s=0.0, master_weights=True)),
    "xadamw s=1 bf16 master": Arm("adamw", partial(_xadamw, s=1.0, master_weights=True)),
}
"""By name, the base of each family first. Overshoot (arXiv 2501.09556) for momentum is XSGDM with its s."""

BASE = {
    family: next(name for name, arm in ARMS.items() if arm.family == family)
    for family in dict.fromkeys(arm.family for arm in ARMS.values())
}


def true_weights(optimizer: Any) -> AbstractContextManager[object]:
    """The weights that the method is to be judged by are in the parameters inside the block."""
    if hasattr(optimizer, "true_weights"):
        return optimizer.true_weights()
    if type(optimizer).__name__.endswith("ScheduleFree"):
        return _averaged(optimizer)
    return nullcontext()


@contextmanager
def _averaged(optimizer: Any) -> Iterator[None]:
    optimizer.eval()
    yield
    optimizer.train()
