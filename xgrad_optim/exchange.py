"""Which weights are in place, and who may exchange them now."""

import os
import threading
import weakref
from contextlib import ExitStack
from operator import methodcaller
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from xgrad_optim.hooks import Attachment


class Pin:
    """An open `true_weights()` block. It is held by the block alone, so that nothing keeps one open that has ended.

    Attributes:
        was_predicted: whether theta_hat is to come back at its end; a flag on a device where only that knows.
    """

    was_predicted: bool | Tensor = False


class Exchange:
    """Which weights an optimizer has put in place last, and the models that must hear of it.

    One for each optimizer, changed in place and never replaced: hooks and wrappers of the optimizer share it.

    Attributes:
        mode: True where the parameters hold theta_hat, False where they hold theta, None where a look at the state
            must tell: after a load, a step that skipped parameters, and while weights are being exchanged; and until
            the models are checked.
        is_checked: whether the models are known to be such that forwards see all of their weights in one mode.
        lock: held by steps and swaps, which therefore see and leave whole weights, whatever thread they run in.
        is_loaded: whether the state was loaded and not used since: the model that belongs to it may still be to come.
        pins: the `true_weights()` blocks that are open.
        traced: of the attached modules that dynamo is inlining, the id of the outermost one, or 0. The module itself
            would be one object by two names to torch.compile, which refuses that.
        attachments: the optimizer's own, as long as their models live.
        successor: the class of the optimizer that has taken the parameters over, if one has.
    """

    def __init__(self) -> None:
        self.mode: bool | None = None
        self.is_checked = True
        self.lock = threading.RLock()
        self.is_loaded = False
        self.pins: weakref.WeakSet[Pin] = weakref.WeakSet()
        self.traced = 0
        self.attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()
        self.successor: str | None = None
        exchanges.add(self)

    def __reduce__(self) -> tuple[type["Exchange"], tuple[()]]:
        return Exchange, ()  # a copy of an optimizer is attached to nothing, and no lock can be copied

    def turn(self, mode: bool | None) -> None:
        """Note what the parameters now hold."""
        if not self.is_checked:
            self.is_checked = not any(map(methodcaller("problem"), self.attachments))
        self.mode = mode if self.is_checked else None
        self.traced = 0

    def begin(self, is_swap: bool) -> None:
        """Parameters are about to change, in a step or outside of one."""
        self.turn(None)
        if is_swap:
            self.drop_copies()

    def check(self) -> None:
        """Raise RuntimeError with what is wrong with a model that the optimizer is attached to."""
        for attachment in self.attachments:
            problem = attachment.problem()
            if problem is not None:
                raise RuntimeError(problem)
        self.is_checked = True

    def drop_copies(self) -> None:
        """Parameters are about to change outside of a step: drop what torch has computed of them for further use."""
        torch.clear_autocast_cache()
        parametrize._cache.clear()
        for attachment in self.attachments:
            attachment.reshard()

    def extend(self) -> None:
        """The optimizer has new parameters, so more modules may concern it."""
        for attachment in self.attachments:
            attachment.add_hooks()

    def hand_over(self, successor: str) -> None:
        """Another optimizer, of this class, predicts the parameters from now on. They must hold theta."""
        self.successor = successor
        for pin in self.pins:
            pin.was_predicted = False
        for attachment in list(self.attachments):
            attachment.remove()

    def check_not_replaced(self) -> None:
        """Raise RuntimeError where another optimizer predicts the same parameters by now."""
        if self.successor is not None:
            raise RuntimeError(
                f"this optimizer was detached from its model when {self.successor}, which has some of the same "
                "parameters, was attached: only one of them can predict a parameter. To go on with this one, call "
                "remove() on the other's handle and attach this one again"
            )


exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()
"""Those of all optimizers that live."""

_forking = threading.local()


def _hold_all() -> None:
    """Let no fork fall into a step or swap of another thread: its child would have half of it, and a lock for ever."""
    _forking.locks = ExitStack()
    for exchange in sorted(exchanges, key=id):  # in one order, for two threads may fork
        _forking.locks.enter_context(exchange.lock)


def _release_all() -> None:
    _forking.locks.close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all)
