"""Optimizers around ours, as frameworks make them."""

import pytest


class ForwardingWrapper:
    """Lightning 2.6's LightningOptimizer: our class, its own __dict__, reads forwarded, writes its own."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class CopyingWrapper:
    """The trick of earlier releases: the wrapper starts with a copy of the optimizer's __dict__."""

    def __init__(self, optimizer):
        self.__dict__ = {key: value for key, value in vars(optimizer).items() if key not in ("step", "__del__")}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})
        self._optimizer = optimizer


either_wrapper = pytest.mark.parametrize("wrap", [ForwardingWrapper, CopyingWrapper], ids=lambda wrap: wrap.__name__)
