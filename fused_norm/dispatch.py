"""Which backend serves a call. This is the only place that chooses.

``auto`` takes the first of the list for the tensor's device that can run here, and logs once why an earlier one could
not; where a CUDA device has native and Triton kernels for the norms, :mod:`.backends.by_size` shares them out. A
backend asked for by name, with :func:`use_backend` or the environment variable ``FUSED_NORM_BACKEND``, runs or raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

from . import __version__

_MODULES = {
    "triton": "fused_norm.backends.triton",
    "native": "fused_norm.backends.native",
    "torch": None,  # torch's own function: no module of ours
    "reference": "fused_norm.reference",
}
BACKENDS = tuple(_MODULES)
_AUTO_ORDER = {"cuda": ("triton", "native", "torch"), "cpu": ("native", "torch")}
_BY_SIZE = "fused_norm.backends.by_size"  # for ``auto`` alone

_log = logging.getLogger("fused_norm")
_warned: dict[str, object] = {}


def _checked(name: str) -> str:
    if name != "auto" and name not in _MODULES:
        raise ValueError(f"unknown fused_norm backend {name!r}; the backends are {', '.join(('auto', *_MODULES))}")
    return name


_default = _checked(os.environ.get("FUSED_NORM_BACKEND") or "auto")
_chosen: ContextVar[str] = ContextVar("fused_norm_backend", default=_default)
#: The choice made last, in any thread. Dynamo cannot trace a ContextVar, but guards on this: a new choice recompiles.
_latest = _default


def load(name: str) -> ModuleType | None:
    """A backend's module; None for ``torch``, which has none of ours."""
    return None if _MODULES[name] is None else importlib.import_module(_MODULES[name])


def unavailable(name: str, op: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot run ``op`` on ``device_type`` on this machine, or None if it can."""
    module = load(name)
    if module is None:
        return None
    if not hasattr(module, f"{op}_forward"):
        return f"it has no {op} kernel"
    return module.unavailable(device_type)


def _warn_once(message: str) -> None:
    mine = object()  # threads that make their first call together all come here: setdefault lets one of them through
    if _warned.setdefault(message, mine) is mine:
        _log.warning("%s", message)


@functools.cache
def _auto(op: str, device_type: str) -> ModuleType | None:
    if (op, device_type) == ("norm", "cuda"):
        reasons = [unavailable(name, op, device_type) for name in ("native", "triton")]
        if reasons == [None, None]:
            return importlib.import_module(_BY_SIZE)
    missing = []
    for name in _AUTO_ORDER.get(device_type, ("torch",)):
        module = load(name)
        if module is not None and not hasattr(module, f"{op}_forward"):
            continue  # nothing is missing on this machine
        reason = unavailable(name, op, device_type)
        if reason is None:
            if missing:
                _warn_once(f"backend {name!r} serves {op} on {device_type} tensors: {'; '.join(missing)}")
            return module
        missing.append(f"{name} cannot: {reason}")
    raise AssertionError("the torch backend serves every device")


@functools.cache
def _named(name: str, op: str, device_type: str) -> ModuleType | None:
    reason = unavailable(name, op, device_type)
    if reason is not None:
        raise RuntimeError(
            f"fused_norm backend {name!r} was asked for, but cannot run {op} on {device_type} tensors: {reason}"
        )
    return load(name)


#: ``plain_row_length(x, normalized_shape, weight, bias)``: the elements in a row of an ordinary call, whose arguments
#: need no further check or conversion whatever the backend; 0 for any other, and for all without the extension.
plain_row_length = load("native").plain_row_length


def select(op: str, device_type: str) -> ModuleType | None:
    """The backend module for ``op`` ("norm" or "ticks") on ``device_type``; None for torch's own function.

    Raises RuntimeError if the user chose a backend that cannot run there.
    """
    return _backend(_chosen.get(), op, device_type)


def _backend(name: str, op: str, device_type: str) -> ModuleType | None:
    return _auto(op, device_type) if name == "auto" else _named(name, op, device_type)


def compile_plan(op: str, device_type: str) -> str:
    """For code that torch.compile traces: the backend's name, to be baked into the graph and handed to `planned`.

    It is a part of the graph because compiled graphs are cached on disk by what they hold: another backend, or another
    version of this package, must not find this one's.
    """
    return _plan(op, device_type, _latest)


def _plan(op: str, device_type: str, latest: str) -> str:
    module = _backend(latest, op, device_type)
    name = "torch" if module is None else module.__name__.rpartition(".")[2]
    if module is not None and module.__name__ == _BY_SIZE:
        name = "auto"
    return f"{name} {__version__}"


_plan._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which imports all of Dynamo to do this


@contextlib.contextmanager
def planned(plan: str) -> Iterator[None]:
    """Context manager: calls inside run on the backend of :func:`compile_plan`."""
    token = _chosen.set(plan.partition(" ")[0])
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager: calls inside run on backend ``name``, in this thread (or asyncio task) alone.

    Calls that no backend of ours serves (under ``torch.export`` or ``torch.jit.trace``, on tensor subclasses) go to
    torch's own function all the same. With activation checkpointing, which recomputes forward during backward, choose
    by ``FUSED_NORM_BACKEND``. Compiled code goes by the choice that was made last in the process, by whatever thread.

    Args:
        name: ``"auto"``, ``"triton"``, ``"native"``, ``"torch"`` or ``"reference"``. Backward runs on the backend that
            forward ran on, inside the context or not.

    Raises:
        ValueError: if there is no such backend. A call raises RuntimeError if the backend cannot run on its tensors.
    """
    global _latest
    token = _chosen.set(_checked(name))
    _latest = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _latest = _chosen.get()


def device_types() -> list[str]:
    """The device types present on this machine: always ``cpu``, then the accelerator's if there is one."""
    found = ["cpu"]
    if torch.accelerator.is_available():
        found.append(torch.accelerator.current_accelerator().type)
    return found


def available_backends() -> dict[str, str | None]:
    """For each backend None if it can run on some device of this machine, else the reason why it cannot."""
    result: dict[str, str | None] = {}
    for name in _MODULES:
        reasons = [unavailable(name, "norm", device_type) for device_type in reversed(device_types())]
        result[name] = None if None in reasons else reasons[0]
    return result
