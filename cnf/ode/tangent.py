"""Whether the solve is differentiated or mapped from outside: forward mode, and torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

# Whether a transform of torch.func (grad, jvp, vmap, …) is under way; asked once a sum.
is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_forward() -> bool:
    """Whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def carries_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether forward-mode differentiation goes through one of the tensors."""
    return is_forward() and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def are_batched(cotangents: Iterable[Tensor]) -> bool:
    """Whether many cotangents are pulled back at once, as for a vectorized Jacobian."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return any(map(functorch.is_legacy_batchedtensor, cotangents))


def is_unreadable(tensors: Iterable[Tensor]) -> bool:
    """Whether no number can be read from the tensors now: under torch.func.vmap, while torch.export
    traces, and while a CUDA graph is captured.
    """
    captures = (
        any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()
    )
    return captures or is_exported() or is_mapped()


# Whether torch.export traces just now; before torch 2.7 nobody can tell.
is_exported: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def numbers_of(tensor: Tensor) -> Any:
    """What tensor.tolist() gives, also while torch.func differentiates: torch 2.6 reads single
    numbers there, no lists.  Raises RuntimeError under a vmap that maps them.
    """
    try:
        return tensor.tolist()
    except RuntimeError:
        single = [number.item() for number in tensor.flatten()]
        return np.array(single).reshape(tensor.shape).tolist()


def is_mapped() -> bool:
    """Whether torch.func.vmap is under way: there no number can be read from a tensor."""
    if not is_transformed():
        return False
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    levels = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Vmap for level in levels)
