"""Plain tensor functions that are compiled when they are first called on a GPU.

Most are called without gradients, from inside an `autograd.Function` that has its backward written out, where what is
kept for the backward is chosen by hand; one that is called with gradients gets the compiler's backward. Elsewhere than
on a GPU, and where the compiler does not work, the plain function itself is called.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = {"cuda"}
"""Types of device that functions are compiled for."""
STATIC_SHAPES = 12
"""So many combinations of shapes get code of their own; all others share code for any shape, which is slower."""
RECOMPILE_LIMIT = 4 * STATIC_SHAPES
_failure: list[str] = []


class Compiled(Generic[P, R]):
    """A function of tensors and constants, compiled at its first call on a device of `DEVICES`."""

    def __init__(self, plain: Callable[P, R]) -> None:
        functools.update_wrapper(self, plain)
        self.plain = plain
        self._static = torch.compile(plain, fullgraph=True, dynamic=False)
        self._any = torch.compile(plain, fullgraph=True, dynamic=True)
        self._seen: dict[Any, bool] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for x in args if isinstance(x, Tensor))
        if first.device.type not in DEVICES or _failure:
            return self.plain(*args, **kwargs)
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled(first.device.type))
        key = (*modes, torch.get_float32_matmul_precision(), *map(_guarded, args))
        is_static = self._seen.get(key)
        if is_static is not None:
            return (self._static if is_static else self._any)(*args, **kwargs)
        is_static = sum(self._seen.values()) < STATIC_SHAPES
        try:
            # PyTorch's own limit is meant for functions nobody counted the shapes of.
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                result = (self._static if is_static else self._any)(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's, of whichever of its layers
            _failure.append(f"{type(error).__name__}: {error}")
            warnings.warn(
                f"torch.compile failed, the student's element-wise operations run uncompiled and slower: {_failure[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.plain(*args, **kwargs)
        self._seen[key] = is_static
        return result


def _guarded(x: Any) -> Any:
    """What of an argument code is compiled for."""
    return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Plain functions inside: for inputs of so many shapes that compiling would take longer than it saves."""
    kept = set(DEVICES)
    DEVICES.clear()
    try:
        yield
    finally:
        DEVICES.update(kept)


def compiled(plain: Callable[P, R]) -> Compiled[P, R]:
    """Decorator: see `Compiled`."""
    return Compiled(plain)
