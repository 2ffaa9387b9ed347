"""Running a network in float64 throughout, also where its code casts to float32."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_SHORT = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_FILLS = {torch.full, torch.full_like, Tensor.new_full}


class InFloat64(TorchFunctionMode):
    """A cast to fewer bits is one to float64, but of a number that is written in the code.

    Many networks compute norms, softmax and angles in float32 whatever their own dtype is. What
    is compared in float64 would agree to the rounding of float32 only.

    Example:
        >>> x = torch.ones(1, dtype=torch.float64)
        >>> with InFloat64():
        ...     (x.float() / 3).dtype
        torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        if func in _FILLS and (kwargs or {}).get("dtype") in _SHORT:
            return func(*args, **kwargs).double()
        args, kwargs = tree_map(_lengthened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _lengthened(value: Any) -> Any:
    is_short = isinstance(value, torch.dtype) and value in _SHORT
    return torch.float64 if is_short else value


def precisely(dtype: torch.dtype, run: Callable[[], object]) -> AbstractContextManager[object]:
    """Runs it in the dtype; how to run it again, and what is like it, as precisely.

    Raises:
        Exception: whatever `run` raises.
    """
    if dtype is torch.float64:
        mode = InFloat64()
        try:
            with mode:
                run()
            return mode
        except Exception:  # its code relies on its casts
            pass
    run()
    return nullcontext()
