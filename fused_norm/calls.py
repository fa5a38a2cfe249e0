"""What the public functions ask of their surroundings: which tensors are ordinary, and what torch is doing."""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = frozenset({Tensor, torch.nn.Parameter})
LOW_PRECISION = frozenset({torch.bfloat16, torch.float16})
DTYPES = frozenset({torch.float64, torch.float32}) | LOW_PRECISION
DTYPE_NAMES = "float64, float32, bfloat16 and float16"
is_compiling = torch.compiler.is_compiling
is_tracing = torch._C._is_tracing
functorch_active = torch._C._are_functorch_transforms_active


def is_exporting() -> bool:
    # torch.compiler.is_exporting, which Dynamo of torch 2.11 takes for true in all that it traces.
    return torch.compiler._is_exporting_flag


def functionalizing() -> bool:
    """Under torch.func.functionalize, which takes no autograd.Function."""
    return functorch_active() and any(
        i.key() == torch._C._functorch.TransformType.Functionalize for i in torch._C._functorch.get_interpreter_stack()
    )


def autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
