"""Swap the norms of a model for the fused ones, and back.

A swap changes the module's class and nothing else: the object, its Parameters, buffers, hooks and name stay, so
optimisers, tied weights, state_dict, deepcopy and pickle do not notice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .modules import LayerNorm, RMSNorm

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}
_ORIGINAL = "_fused_norm_original_class"  # on a swapped module: what unpatch gives back


@dataclass
class PatchReport:
    """What :func:`patch` did: ``swapped`` names what it swapped, ``left`` the other norms, with the reason for each."""

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused_norm: {len(self.swapped)} norms swapped, {len(self.left)} left"]
        lines += [f"  swapped {name}" for name in self.swapped]
        lines += [f"  left    {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def _reason_left(module: nn.Module) -> str | None:
    """Why ``module``, which looks like a norm, is not swapped; None if it does not look like one."""
    cls = type(module)
    if getattr(module, "original_name", None) in {base.__name__ for base in _SWAPS}:
        return f"{module.original_name} is compiled by TorchScript"
    if cls in _SWAPS.values():
        return f"{cls.__name__} is fused already"
    for base in _SWAPS:
        if isinstance(module, base):
            return f"{cls.__qualname__} is a subclass of nn.{base.__name__}, which may compute something else"
    if "norm" in cls.__name__.lower() and not any(module.children()):
        return f"{cls.__qualname__} is not a norm this package knows"
    return None


def patch(model: nn.Module) -> PatchReport:
    """Swap every exact :class:`torch.nn.LayerNorm` and :class:`torch.nn.RMSNorm` in ``model``, in place.

    Subclasses and unknown norms are reported and left alone. Patching twice changes nothing more.

    Returns:
        A :class:`PatchReport`, which prints as a list of what was swapped and what was left, and why.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module, not {type(model).__name__}")
    report = PatchReport()
    for name, module in model.named_modules():
        fused = _SWAPS.get(type(module))
        if fused is not None:
            module.__dict__[_ORIGINAL] = type(module)
            module.__class__ = fused
            report.swapped.append(name or "(the model itself)")
        elif (reason := _reason_left(module)) is not None:
            report.left[name or "(the model itself)"] = reason
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Give back their class to the modules that :func:`patch` swapped. Fused modules that a user built are left.

    Returns:
        The names of the modules whose class was given back. One whose class was changed after :func:`patch` (by
        ``parametrize`` or FSDP2, say) keeps it: undo that first.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch takes a torch.nn.Module, not {type(model).__name__}")
    given_back = []
    for name, module in model.named_modules():
        if type(module) in _SWAPS.values() and _ORIGINAL in module.__dict__:
            module.__class__ = module.__dict__.pop(_ORIGINAL)
            given_back.append(name or "(the model itself)")
    return given_back
