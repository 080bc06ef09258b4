"""Methods of a single module, which stand before those of its class, and what copies of the module make of them."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn import Module


class Cover:
    """A function in place of a module's method, called with the module, the method that it covers, and the arguments.

    It stands among the module's attributes and so refers to it weakly; in a copy of these it refers to the copy.
    """

    def __init__(self, function: Callable[..., Any], name: str, module: Module | None) -> None:
        self._function, self._name = function, name
        self._module = (lambda: None) if module is None else weakref.ref(module)
        self.covered = None if module is None else vars(module).get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        covered = self.covered or partial(getattr(type(module), self._name), module)  # dynamo knows no __get__
        return self._function(module, covered, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cover":
        return Cover(self._function, self._name, memo.get(id(self._module())))

    def __reduce__(self) -> tuple[type["Cover"], tuple[Any, ...]]:
        return Cover, (self._function, self._name, None)


def cover(module: Module, name: str, function: Callable[..., Any]) -> None:
    """Let the function stand for the module's method of this name; a second time adds nothing."""
    if not isinstance(vars(module).get(name), Cover):
        vars(module)[name] = Cover(function, name, module)


def uncover(module: Module) -> None:
    """Let the module have the methods again that it had before."""
    for name, value in list(vars(module).items()):
        if isinstance(value, Cover):
            if value.covered is None:
                del vars(module)[name]
            else:
                vars(module)[name] = value.covered


class _Hooks(OrderedDict[int, Any]):
    """A table of hooks in a copy of a module: a shallow copy, which shares the weights, keeps all of them; a deep copy
    or a pickle is made without those in `left_out`.
    """

    left_out: frozenset[int]

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ([(key, hook) for key, hook in self.items() if key not in self.left_out],)


def without(state: dict[str, Any], hook_ids: frozenset[int]) -> dict[str, Any]:
    """The attributes of a module, as `__getstate__` returns them, for copies without covers and without these hooks."""
    kept = {name: value for name, value in state.items() if not isinstance(value, Cover)}
    for name, value in kept.items():
        if isinstance(value, OrderedDict) and not hook_ids.isdisjoint(value):
            kept[name] = table = _Hooks(value)
            table.left_out = hook_ids
    return kept
