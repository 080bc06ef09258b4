"""An interrupt at a chosen line: what Ctrl-C or a signal can do to code in Python."""

import contextlib
import linecache
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


class Interrupt(BaseException):
    """As KeyboardInterrupt: no `except Exception` catches it."""


def is_interrupted(n: int, act: Callable[[], object], is_ours: Callable[[CodeType], bool]) -> bool:
    """Run `act` and raise in the n-th line of code that is ours; whether there is such a line.

    A `with` statement is visited once more when its block ends. Python runs no handler of a signal there, so that
    nothing ever keeps it from leaving the block.
    """
    count = 0
    has_raised = False
    seen: set[tuple[int, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any):
        nonlocal count, has_raised
        if not is_ours(frame.f_code):
            return None
        if event == "line" and not has_raised:
            visit = id(frame), frame.f_lineno
            if visit in seen and _is_with(frame):
                return trace
            seen.add(visit)
            if count == n:
                has_raised = True
                raise Interrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            count += 1
        return trace

    with contextlib.suppress(Interrupt):
        _run_traced(act, trace)
    assert has_raised or count > 0, "no line of ours has run"
    return has_raised


def _run_traced(act: Callable[[], object], trace: Callable[..., Any]) -> None:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)


def _is_with(frame: FrameType) -> bool:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def visits(act: Callable[[], object], is_ours: Callable[[CodeType], bool], every: bool) -> list[int]:
    """The n to interrupt at: of each line that `act` runs the first and the last visit, or every one."""
    first: dict[tuple[CodeType, int], int] = {}
    last: dict[tuple[CodeType, int], int] = {}
    count = 0

    def trace(frame: FrameType, event: str, argument: Any):
        nonlocal count
        if not is_ours(frame.f_code):
            return None
        if event == "line":
            first.setdefault((frame.f_code, frame.f_lineno), count)
            last[frame.f_code, frame.f_lineno] = count
            count += 1
        return trace

    _run_traced(act, trace)
    return list(range(count)) if every else sorted({*first.values(), *last.values()})


def in_modules(*names: str) -> Callable[[CodeType], bool]:
    """Whether code stands in one of these modules of the library."""
    files = {sys.modules[f"xgrad_optim.{name}"].__file__ for name in names}
    return lambda code: code.co_filename in files
