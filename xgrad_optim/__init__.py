"""XGrad optimizers for PyTorch: gradients are taken at the weights that the optimizer is about to reach."""

from xgrad_optim.adabelief import XAdaBelief
from xgrad_optim.adam import XAdam, XAdamW
from xgrad_optim.adam3 import XAdaM3
from xgrad_optim.adaplus import XAdaPlus
from xgrad_optim.backends import available_backends
from xgrad_optim.groups import decay_groups
from xgrad_optim.rmsprop import XRMSprop
from xgrad_optim.sgdm import XSGDM
from xgrad_optim.wrapper import XGrad

__all__ = [
    "XSGDM",
    "XAdaBelief",
    "XAdaM3",
    "XAdaPlus",
    "XAdam",
    "XAdamW",
    "XGrad",
    "XRMSprop",
    "available_backends",
    "decay_groups",
]
__version__ = "0.1.0"
