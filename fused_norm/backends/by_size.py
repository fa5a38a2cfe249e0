"""The norms on a CUDA device that has both kinds of kernels: native or Triton's, by the size of a row.

What serves which rows is data, by_size.json, with the results that it rests on. The first rule that holds decides. A
rule names the most ``columns`` by the bytes of an element, the least compute ``capability`` (90 for sm_90), and with
``whole_chunks`` holds for rows of whole 16 bytes alone. None goes by the number of rows: a row's result does not depend
on how many others there are (:mod:`fused_norm.backends`, Order).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from . import native, triton

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_BACKENDS = {"native": native, "triton": triton}


def choose(function: str, n: int, element_size: int, capability: int) -> str:
    """The backend's name for a contract's function and rows of ``n`` elements, on a device of ``capability``."""
    for rule in TABLE["rules"][function]:
        narrow = "columns" not in rule or n <= rule["columns"][str(element_size)]
        whole = not rule.get("whole_chunks") or n * element_size % 16 == 0
        if narrow and whole and capability >= rule.get("capability", 0):
            return rule["backend"]
    raise AssertionError(f"the last rule of {function} holds for all rows")


@functools.cache
def _serving(function: str, n: int, element_size: int, device: torch.device):
    major, minor = torch.cuda.get_device_capability(device)
    name = choose(function, n, element_size, 10 * major + minor)
    if name == "native" and native.cuda_reason(device.index):
        name = "triton"  # the extension was built for other devices than this one
    return getattr(_BACKENDS[name], function)


def norm_forward(x, weight, bias, n, *args):
    """The contract's function."""
    return _serving("norm_forward", int(n), x.element_size(), x.device)(x, weight, bias, n, *args)


def norm_backward(dy, x, stats, weight, n, *args):
    """The contract's function."""
    return _serving("norm_backward", int(n), x.element_size(), x.device)(dy, x, stats, weight, n, *args)


# The native backend composes these of others.
norm_double_backward = triton.norm_double_backward
add_norm_forward = triton.add_norm_forward
add_norm_backward = triton.add_norm_backward
