"""Swap the norms of a model for the fused ones, and the residual additions before them, and back.

A swap changes the module's class and nothing else: the object, its Parameters, buffers, hooks and name stay, so
optimisers, tied weights, state_dict, deepcopy and pickle do not notice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from . import adapters
from .modules import LayerNorm, RMSNorm

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}
_FORWARDS = {cls: cls.forward for cls in _SWAPS}  # as torch has them: somebody may patch the class
_ORIGINAL = "_fused_norm_original_class"  # on a swapped module of torch's classes: what unpatch gives back
_OWN_FORWARD = "its forward was replaced on the module itself, as accelerate's hooks and kernelize do"


@dataclass
class PatchReport:
    """What :func:`patch` did.

    Attributes:
        swapped: the names of the norms it swapped.
        residual: the names of the blocks whose residual addition now joins the norm after it.
        left: the other norms, with the reason for each.
        residual_left: the other blocks that look as if they added a residual before a norm, with the reason for each.
    """

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    residual: list[str] = field(default_factory=list)
    residual_left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"fused_norm: {len(self.swapped)} norms swapped, {len(self.left)} left; "
            f"{len(self.residual)} residual blocks swapped, {len(self.residual_left)} left"
        ]
        lines += [f"  swapped {name}" for name in self.swapped]
        lines += [f"  left    {name}: {reason}" for name, reason in self.left.items()]
        lines += [f"  swapped {name} (residual)" for name in self.residual]
        lines += [f"  left    {name} (residual): {reason}" for name, reason in self.residual_left.items()]
        return "\n".join(lines)


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class to give to ``module``, a norm or a block; None to leave it."""
    cls = type(module)
    if "forward" in module.__dict__:
        return None
    if cls in _SWAPS:
        return _SWAPS[cls] if cls.forward is _FORWARDS[cls] else None
    return adapters.adapter(cls)


def _is_fused(cls: type) -> bool:
    return cls in _SWAPS.values() or adapters.stock_class(cls) is not None or cls.__module__ == LayerNorm.__module__


def _reason_left(module: nn.Module) -> str | None:
    """Why ``module``, which looks like a norm, is not swapped; None if it does not look like one."""
    cls = type(module)
    if getattr(module, "original_name", None) in {base.__name__ for base in _SWAPS}:
        return f"{module.original_name} is compiled by TorchScript"
    base = next((base for base in _SWAPS if isinstance(module, base)), None) or adapters.known_base(cls, blocks=False)
    named = "norm" in cls.__name__.lower() and not any(module.children())
    if (base is None and not named) or adapters.block_norms(cls):
        return None
    if _is_fused(cls):
        return f"{cls.__name__} is fused already"
    if "forward" in module.__dict__:
        return f"{cls.__qualname__}: {_OWN_FORWARD}"
    if cls in _SWAPS:
        return f"{cls.__qualname__}.forward was replaced for all of its kind"
    if adapters.find(cls) is not None:
        return f"{cls.__qualname__} computes what a norm of transformers does, but is {cls.__module__}'s own"
    if base is not None:
        name = f"nn.{base.__name__}" if base in _SWAPS else base.__name__
        return f"{cls.__qualname__} is a subclass of {name}, which may compute something else"
    if adapters.is_library(cls) and adapters.lacks_source(cls):
        return f"{cls.__qualname__} of {cls.__module__} cannot be known: the source of its forward is not there"
    return f"{cls.__qualname__} of {cls.__module__} is not a norm this package knows"


_BLOCKS = ("Layer", "Block", "Output")


def _block_reason_left(module: nn.Module) -> str | None:
    """Why ``module``, which looks like a residual block, is not swapped; None if it does not look like one."""
    cls = type(module)
    fused_norms = [name for name, child in module.named_children() if adapters.fusable(child)]
    if adapters.block_norms(cls):
        return None
    if (base := adapters.known_base(cls, blocks=True)) is not None:
        return f"{cls.__qualname__} is a subclass of {base.__name__}, which may compute something else"
    if not fused_norms or not adapters.is_library(cls) or not cls.__name__.endswith(_BLOCKS):
        return None
    if "forward" in module.__dict__:
        return f"{cls.__qualname__}: {_OWN_FORWARD}"
    if adapters.lacks_source(cls):
        return f"{cls.__qualname__}: the source of its forward is not there"
    return f"{cls.__qualname__} is not a block this package knows; its norms ({', '.join(fused_norms)}) are fused alone"


def patch(model: nn.Module, *, residual: bool = True) -> PatchReport:
    """Swap the norms in ``model`` for fused ones, in place, and join residual additions to them.

    Norms: every exact :class:`torch.nn.LayerNorm` and :class:`torch.nn.RMSNorm`, and the norms of transformers and timm
    whose code this package knows: RMSNorm of Llama and some 140 copies of it, of T5, Gemma, OLMo 2; LayerNorm of OLMo,
    Cohere, Nemotron, DeBERTa, timm and others. Blocks: any module of those, and torch's transformer layers, whose
    forward adds two tensors and hands the sum straight to one of these norms, as the output blocks of BERT and the
    layers of Llama, GPT-2, BART and ViT do; a dropout just before the addition joins them. The new forward is made from
    the source of the old one. An addition whose norm is in another module stays: a decoder layer's last, which the next
    layer's first norm takes.

    What is not known is left and reported: subclasses, norms of other packages, code that came with a checkpoint,
    classes and modules whose forward somebody replaced, forwards without their source. A fused block looks at each call
    whether its norm and its dropout still are what they were, and nobody watches them by hooks, and if not calls them
    one by one (but not whether somebody has replaced the forward of the class it came from). Patching twice changes
    nothing more.

    Args:
        model: any module.
        residual: False for the norms alone. It does not give back blocks swapped before: :func:`unpatch` does.

    Returns:
        A :class:`PatchReport`, which prints as a list of what was swapped and what was left, and why.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module, not {type(model).__name__}")
    report = PatchReport()
    blocks = []
    for name, module in model.named_modules():
        name = name or "(the model itself)"
        fused = _fused_class(module)
        if fused is not None and adapters.block_norms(fused):
            blocks.append((name, module, fused))
        elif fused is not None:
            if type(module) in _SWAPS:
                module.__dict__[_ORIGINAL] = type(module)
            module.__class__ = fused
            report.swapped.append(name)
        elif (reason := _reason_left(module)) is not None:
            report.left[name] = reason
    if not residual:
        return report
    for name, module, fused in blocks:
        norms = {attribute: getattr(module, attribute, None) for attribute in adapters.block_norms(fused)}
        if any(adapters.fusable(norm) for norm in norms.values()):
            module.__class__ = fused
            report.residual.append(name)
        elif named := [attribute for attribute in norms if "norm" in attribute.lower() or attribute.startswith("ln")]:
            found = ", ".join(f"{attribute} is {type(norms[attribute]).__name__}" for attribute in named)
            report.residual_left[name] = f"{type(module).__qualname__}: no fused norm takes its sum ({found})"
    for name, module in model.named_modules():
        if (reason := _block_reason_left(module)) is not None:
            report.residual_left.setdefault(name or "(the model itself)", reason)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Give back their class to the modules that :func:`patch` swapped. Fused modules that a user built are left.

    Returns:
        The names of the modules whose class was given back. One whose class was changed after :func:`patch` (by
        ``parametrize`` or FSDP2, say), or that got a forward of its own (by accelerate's hooks, which hold the fused
        one), keeps it: undo that first.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch takes a torch.nn.Module, not {type(model).__name__}")
    given_back = []
    for name, module in model.named_modules():
        cls, own = type(module), module.__dict__.get("forward")
        stock = module.__dict__.get(_ORIGINAL) if cls in _SWAPS.values() else adapters.stock_class(cls)
        left_behind = getattr(own, "__func__", None) is cls.forward  # by accelerate, where its hook was
        if stock is None or (own is not None and not left_behind):
            continue
        if left_behind:
            del module.forward
        module.__dict__.pop(_ORIGINAL, None)
        module.__class__ = stock
        given_back.append(name or "(the model itself)")
    return given_back
