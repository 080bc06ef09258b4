"""Warnings that name the caller's line."""

import sys
import warnings
from types import FrameType

_INSIDE = frozenset({"xgrad_optim", "torch", "contextlib", "copy"})
"""Top-level modules on the way from a caller to a warning."""


def warn(message: str) -> None:
    """Warn at the innermost line outside of this library and torch.

    A `stacklevel` would have to count the frames between, which differ from caller to caller; and warnings that all
    name one line of this library are shown once in a program, whoever they are meant for.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None and _module(frame).partition(".")[0] in _INSIDE:
        frame = frame.f_back
    assert frame is not None
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        _module(frame),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
