"""Which classes :func:`fused_norm.patch` knows, and the classes that take their place.

An adapter subclasses the class it replaces, has its names, and overrides ``forward`` alone. A norm of transformers or
timm is known by what its code does and not by its name: ``_NORMS`` has a digest of the forward of each kind, whatever
it is called in whichever model (Llama's has some 140 copies). A forward that another version changes, or that somebody
has patched, has another digest, and is left and reported. A residual block is made from its own forward by
:mod:`.rewriting`, which needs to know none.

Neither package is ever imported here: a model that holds its classes has imported it.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as FF
from . import rewriting
from .modules import LayerNorm, RMSNorm

_HALF = (torch.bfloat16, torch.float16)
_FP32 = (torch.float32, *_HALF)  # what fp32 holds

# Decorators of transformers after which a call is still the function's own: they rename a deprecated keyword, or
# checkpoint the call where the model is told to (and wrap an adapter's forward of themselves).
_TRANSPARENT = ("transformers.utils.deprecation", "transformers.modeling_layers")


def unwrapped(function: Any) -> tuple[Callable | None, tuple[str, ...]]:
    """The function under transformers' own decorators, and the keywords that these rename; (None, ()) if not sure."""
    renamed: list[str] = []
    while hasattr(function, "__wrapped__"):
        if getattr(function, "__globals__", {}).get("__name__") not in _TRANSPARENT:
            return None, ()
        free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "old_name" in free:
            renamed.append(free["old_name"].cell_contents)
        function = function.__wrapped__
    return (function, tuple(renamed)) if isinstance(function, types.FunctionType) else (None, ())


@dataclass(frozen=True)
class Known:
    """What takes the place of a norm's forward: a plan (see :class:`Call`), or the adapter's forward where that is not
    enough to say. ``base``: the class derives directly from this, and its forward depends on it."""

    plan: Callable | None = None
    forward: Callable | None = None
    base: type[nn.Module] | None = None


def _digests(cls: type[nn.Module]) -> tuple[str | None, ...]:
    """What the class's forward does, and the method that some of them share the work with."""
    found = []
    for method in ("forward", "_norm"):
        function, _ = unwrapped(getattr(cls, method, None))
        if function is None:
            continue
        modules = {"torch": torch, "nn": nn, "F": F}
        if any(function.__globals__.get(name, module) is not module for name, module in modules.items()):
            return ()
        found.append(rewriting.digest(function))
    return tuple(found)


# The adapters' classes


@dataclass
class _Registry:
    adapters: dict[tuple, type | None] = field(default_factory=dict)  # a stock class, its forward: the adapter, or None
    stocks: dict[type, type] = field(default_factory=dict)  # an adapter: the stock class
    blocks: dict[type, tuple[str, ...]] = field(default_factory=dict)  # a block's adapter: where its sums go
    plans: dict[type, Callable] = field(default_factory=dict)  # a fused norm's class: its plan, see Call


_REGISTRY = _Registry()


def adapter(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The adapter of a class of transformers, timm or torch, always the same one; None if it has none."""
    key = (cls, cls.forward)  # somebody may patch the class between two calls
    if key not in _REGISTRY.adapters:
        _REGISTRY.adapters[key] = _build(cls)
    return _REGISTRY.adapters[key]


def stock_class(cls: type) -> type | None:
    """The class that ``cls``, an adapter, replaces; None if it is no adapter."""
    return _REGISTRY.stocks.get(cls)


def known_base(cls: type[nn.Module], blocks: bool) -> type[nn.Module] | None:
    """The first class above ``cls`` that is an adapter, or has one, of a block or of a norm."""
    for base in cls.__mro__[1:]:
        fused = base if base in _REGISTRY.stocks else adapter(base) if issubclass(base, nn.Module) else None
        if fused is not None and bool(block_norms(fused)) == blocks:
            return base
    return None


def block_norms(cls: type) -> tuple[str, ...]:
    """The attributes that a residual block's adapter hands its sums to, the norms among them; empty for others."""
    return _REGISTRY.blocks.get(cls, ())


def is_library(cls: type) -> bool:
    """Whether transformers or timm defines ``cls``: not code that came with a checkpoint, nor a user's subclass."""
    return cls.__module__.startswith(("transformers.models.", "timm.layers.", "timm.models."))


_TORCH = {cls: cls.forward for cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)}


def lacks_source(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` cannot be known because the source of its forward is not there, or not what runs."""
    function, _ = unwrapped(cls.forward)
    return function is not None and rewriting.source_of(function) is None


def find(cls: type[nn.Module]) -> Known | None:
    """What is known of the norm ``cls``, wherever it comes from."""
    entry = _NORMS.get(_digests(cls))
    return None if entry is None or (entry.base is not None and cls.__bases__ != (entry.base,)) else entry


def _build(cls: type[nn.Module]) -> type[nn.Module] | None:
    # An adapter has its stock class's module, too. A forward of torch's that somebody replaced is not torch's.
    ours = _TORCH.get(cls) is cls.forward if cls in _TORCH else is_library(cls) and cls not in _REGISTRY.stocks
    if not ours:
        return None
    stock = cls.forward
    function, renamed = unwrapped(stock)
    if function is None:
        return None
    entry, norms = find(cls), ()
    if entry is not None and entry.plan is not None:
        plan = entry.plan

        def forward(self, *args, **kwargs):
            if kwargs or len(args) != 1:
                return stock(self, *args, **kwargs)
            (x,) = args
            call = plan(self, x.shape[-1], x.dtype) if isinstance(x, Tensor) and x.ndim else None
            return stock(self, x) if call is None else normalised(call, x)

    else:
        if entry is not None:
            adapted = entry.forward
        elif (found := rewriting.joined(function, add_norm, dropout_add_norm)) is not None:
            adapted, norms = found[0], tuple(dict.fromkeys(found[1]))
        else:
            return None

        def forward(self, *args, **kwargs):
            if any(name in kwargs for name in renamed):  # stock's decorator says what is to be said, and renames it
                return stock(self, *args, **kwargs)
            return adapted(self, *args, **kwargs)

    # pickle looks a class up by its name, and finds the stock one there
    def __reduce_ex__(self, protocol):
        # Protocols before 2 name the class itself.
        function, args, *rest = super(fused, self).__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__ and args[0] is fused:
            return (_new, (cls, *args[1:]), *rest)
        return (function, args, *rest)

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": functools.wraps(function)(forward),
        "__reduce_ex__": __reduce_ex__,
    }
    fused = type(cls)(cls.__name__, (cls,), body)
    _REGISTRY.stocks[fused] = cls
    if entry is not None and entry.plan is not None:
        _REGISTRY.plans[fused] = entry.plan
    if norms:
        _REGISTRY.blocks[fused] = norms
    return fused


def _new(cls: type[nn.Module], *args: Any) -> nn.Module:
    """Unpickle an adapter: as the stock class where this version of it is not known."""
    return (fused := adapter(cls) or cls).__new__(fused, *args)


# Norms: the one call that gives what a module's own forward gives


class Call(NamedTuple):
    """Arguments of our functions, and what else there is to do.

    A plan ``plan(module, n, dtype)`` gives the Call for input of that dtype whose last dimension is ``n``, or None
    where only the stock forward will do: for a size that does not fit (which torch may broadcast, or refuse), and for
    fp64 where the stock forward computes in fp32.
    """

    rms: bool
    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    offset: float = 0.0
    cast: bool = False
    first: torch.dtype | None = None  # the input is cast to this
    then: torch.dtype | None = None  # the normalised input is cast to this
    times: Tensor | None = None  # and multiplied by this, in torch's promotion
    plus: Tensor | None = None  # and this is added
    last: torch.dtype | None = None  # and the result is cast to this
    autocast: bool = False  # whether the stock forward calls a function that autocast makes fp32, as torch's norms do


def _autocast_off(call: Call, x: Tensor) -> bool:
    device_type = x.device.type
    return (
        not call.autocast
        and device_type != "cpu"  # whose autocast leaves norms alone
        and torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    )


def _rest(call: Call, y: Tensor) -> Tensor:
    if call.then is not None:
        y = y.to(call.then)
    if call.times is not None:
        y = call.times * y
    if call.plus is not None:
        y = y + call.plus
    return y if call.last is None else y.to(call.last)


def normalised(call: Call, x: Tensor) -> Tensor:
    """What the module of ``call`` gives for ``x``."""
    if _autocast_off(call, x):
        with torch.autocast(x.device.type, enabled=False):
            return normalised(call._replace(autocast=True), x)
    if call.first is not None:
        x = x.to(call.first)
    if call.rms:
        y = FF.rms_norm(x, call.shape, call.weight, call.eps, weight_offset=call.offset, cast_before_weight=call.cast)
    else:
        y = FF.layer_norm(x, call.shape, call.weight, call.bias, call.eps, weight_offset=call.offset)
    return _rest(call, y)


def _add_normalised(call: Call, x: Tensor, residual: Tensor, p: float, training: bool) -> tuple[Tensor, Tensor]:
    if _autocast_off(call, x):
        with torch.autocast(x.device.type, enabled=False):
            return _add_normalised(call._replace(autocast=True), x, residual, p, training)
    options = {"dropout_p": p, "training": training, "weight_offset": call.offset}
    if call.rms:
        y, summed = FF.add_rms_norm(
            x, residual, call.shape, call.weight, call.eps, cast_before_weight=call.cast, **options
        )
    else:
        y, summed = FF.add_layer_norm(x, residual, call.shape, call.weight, call.bias, call.eps, **options)
    return _rest(call, y), summed


def fusable(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is a fused norm (ours, or an adapter), so that an addition may join it."""
    return type(norm) in _REGISTRY.plans


def _unwatched(module: nn.Module) -> bool:
    """Whether a call of ``module`` is its class's forward and nothing else: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or nn.modules.module._has_any_global_hook()
    )


def add_norm(
    norm: nn.Module, x: Tensor, residual: Tensor, p: float = 0.0, training: bool = False, first: bool = True
) -> tuple[Tensor, Tensor]:
    """``(norm(summed), summed)`` with ``summed = dropout(x, p) + residual``, or ``residual + dropout(x, p)`` where
    ``first`` is False: in one call where ``norm`` is fused and nothing watches or replaces it, and as the separate
    operations of the stock block where not (``x`` and ``residual`` may be whatever has a sum there, and ``norm`` any
    module)."""
    plan = _REGISTRY.plans.get(type(norm))
    if (
        plan is not None
        and isinstance(x, Tensor)
        and isinstance(residual, Tensor)
        and not (x.is_nested or residual.is_nested)
        and x.shape == residual.shape
        and _unwatched(norm)
    ):
        call = plan(norm, x.shape[-1], torch.promote_types(x.dtype, residual.dtype)) if x.ndim else None
        if call is not None and call.first is None:
            return _add_normalised(call, x, residual, p, training)
    x = F.dropout(x, p, training) if p else x
    summed = x + residual if first else residual + x
    return norm(summed), summed


def dropout_add_norm(
    norm: nn.Module, dropout: Callable, x: Tensor, residual: Tensor, first: bool
) -> tuple[Tensor, Tensor]:
    """:func:`add_norm` where the block's dropout is a module."""
    if type(dropout) is nn.Dropout and not dropout.inplace and _unwatched(dropout):
        return add_norm(norm, x, residual, dropout.p, dropout.training, first)
    return add_norm(norm, dropout(x), residual, first=first)


def _plan_layer_norm(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call:
    offset = getattr(module, "weight_offset", 0.0)  # ours, which a user may have built with options; torch's has none
    return Call(False, module.normalized_shape, module.weight, module.bias, module.eps, offset, autocast=True)


def _plan_rms_norm(module: nn.RMSNorm, n: int, dtype: torch.dtype) -> Call:
    offset, cast = module.weight_offset, module.cast_before_weight
    return Call(True, module.normalized_shape, module.weight, None, module.eps, offset, cast, autocast=True)


_REGISTRY.plans[LayerNorm] = _plan_layer_norm
_REGISTRY.plans[RMSNorm] = _plan_rms_norm


def _fits(weight: Any, n: int, dtype: torch.dtype) -> bool:
    """Whether this is a weight for rows of ``n`` that the stock forward casts to fp32 without loss."""
    return isinstance(weight, Tensor) and weight.shape == (n,) and dtype in _FP32 and weight.dtype in _FP32


def _beside(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` as our kernels take it beside ``dtype``, where the stock forward multiplies in fp32."""
    return weight if weight.dtype in (dtype, torch.float32) else weight.float()


def _cast_then_weight(eps: str) -> Callable:
    """RMS: weight * normalised.to(x.dtype), in the wider of the two dtypes."""

    def plan(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
        weight = module.weight
        if not _fits(weight, n, dtype):
            return None
        if weight.dtype == dtype:
            return Call(True, (n,), weight, None, getattr(module, eps), cast=dtype in _HALF)
        return Call(True, (n,), None, None, getattr(module, eps), times=weight)

    return plan


def _weight_then_cast(eps: str, offset: float = 0.0) -> Callable:
    """RMS: ((offset + weight) * normalised).to(x.dtype), all of it in fp32."""

    def plan(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
        weight = module.weight
        if not _fits(weight, n, dtype):
            return None
        return Call(True, (n,), _beside(weight, dtype), None, getattr(module, eps), offset)

    return plan


def _no_weight(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """RMS: normalised.to(x.dtype), in fp32."""
    return Call(True, (n,), None, None, module.eps) if dtype in _FP32 else None


def _plan_gemma4(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    return _weight_then_cast("eps")(module, n, dtype) if module.with_scale else _no_weight(module, n, dtype)


def _plan_t5(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """The result has the weight's dtype, also where that is the narrower: T5 in fp16 keeps some layers in fp32."""
    weight, eps = module.weight, module.variance_epsilon
    if not _fits(weight, n, dtype):
        return None
    if weight.dtype == dtype:
        return Call(True, (n,), weight, None, eps, cast=dtype in _HALF)
    if dtype == torch.float32:
        return Call(True, (n,), None, None, eps, then=weight.dtype, times=weight)
    if weight.dtype == torch.float32:
        return Call(True, (n,), weight, None, eps, first=torch.float32)
    return None


def _plan_imagegpt(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """In x's own dtype throughout: below fp32 that is not what our kernels compute."""
    weight = module.weight
    if weight.shape != (n,) or weight.dtype != dtype or dtype not in (torch.float32, torch.float64):
        return None
    return Call(True, (n,), weight, None, module.eps)


def _plan_olmo(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    return Call(False, module.normalized_shape, None, None, 1e-5) if dtype in _FP32 else None


def _plan_cohere(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """The weight of a norm of queries or keys is (heads, n)."""
    weight, eps = module.weight, module.variance_epsilon
    if dtype not in _FP32 or weight.dtype not in _FP32 or weight.shape[-1:] != (n,):
        return None
    if weight.ndim == 1:
        return Call(False, (n,), _beside(weight, dtype), None, eps)
    return Call(False, (n,), None, None, eps, first=torch.float32, times=weight.float(), last=dtype)


def _plan_deberta(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """Rounded once, where the stock forward of a half-precision model rounds three times."""
    weight, bias, eps = module.weight, module.bias, module.variance_epsilon
    if not _fits(weight, n, dtype) or not _fits(bias, n, dtype):
        return None
    if weight.dtype == bias.dtype == dtype:
        return Call(False, (n,), weight, bias, eps)
    return Call(False, (n,), None, None, eps, times=weight, plus=bias)


def _plan_nemotron(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call | None:
    """1 + weight. Under CUDA autocast (and that alone) the stock forward casts all to autocast's dtype, where
    layer_norm would have fp32; without, parameters in a dtype that torch refuses are left for it to refuse."""
    weight, bias = module.weight, module.bias
    if not _fits(weight, n, dtype) or (bias is not None and (bias.shape != (n,) or bias.dtype != weight.dtype)):
        return None
    first = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled() else dtype
    if weight.dtype != first and (weight.dtype != torch.float32 or first not in _HALF):
        return None
    return Call(False, (n,), weight, bias, module.eps, 1.0, first=None if first == dtype else first)


def _plan_chameleon(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call:
    """The weight and the bias are (heads, n)."""
    shape = module.normalized_shape
    return Call(False, shape, None, None, 1e-5, times=module.weight, plus=module.bias, autocast=True)


def _plan_esmc(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call:
    return _plan_layer_norm(module, n, dtype)._replace(last=dtype)


def _own_layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    return FF.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _convnext(self, features):
    if self.data_format == "channels_first":
        return _own_layer_norm(self, features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return _own_layer_norm(self, features)


def _plan_timm(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call | None:
    """timm's LayerNorm has another way, which a user turns on."""
    return None if module._fast_norm else _plan_layer_norm(module, n, dtype)


def _timm_2d(self, x):
    if self._fast_norm:
        return stock_class(type(self)).forward(self, x)
    return _own_layer_norm(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _eomt(self, hidden_state):
    return _own_layer_norm(self, hidden_state.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


#: What the digests of a class's forward and ``_norm`` say it is.
_NORMS: dict[tuple[str | None, ...], Known] = {
    ("0a6a5dfdf5179be0",): Known(_cast_then_weight("variance_epsilon")),  # LlamaRMSNorm
    ("337d81b6d769b6c9", "078e6c1d9de49357"): Known(_cast_then_weight("eps")),  # Llama4TextRMSNorm
    ("34769db5c5fd75dc",): Known(_cast_then_weight("eps")),  # CpmAntLayerNorm
    ("467d2fc1d5a62b12",): Known(_weight_then_cast("variance_epsilon")),  # Olmo2RMSNorm
    ("3447b24478c25175",): Known(_weight_then_cast("variance_epsilon")),  # HeliumRMSNorm
    ("09439c829b4875fb", "078e6c1d9de49357"): Known(_weight_then_cast("eps")),  # MoshiRMSNorm
    ("1b39a878df291695", "078e6c1d9de49357"): Known(_weight_then_cast("eps", offset=1.0)),  # GemmaRMSNorm
    ("7c87c53da6e366b2", "c7b9a7b3eab5a053"): Known(_plan_gemma4),
    ("bd5d20f14ee44762", "078e6c1d9de49357"): Known(_no_weight),  # NanoChatRMSNorm
    ("8bc0730a72198945",): Known(_no_weight),  # Inkling2UnweightedRMSNorm
    ("bc5468382634ede6",): Known(_plan_t5),
    ("8b63b994edf36c66",): Known(_plan_imagegpt),
    ("cad2865e10ca1650",): Known(_plan_olmo),
    ("8b33cdf85aae3008",): Known(_plan_cohere),
    ("f0c407365fda3430",): Known(_plan_deberta),
    ("e34e0e3b078aef4e",): Known(_plan_nemotron, base=nn.LayerNorm),
    ("6ca19329b2ac4c3e",): Known(_plan_chameleon, base=nn.LayerNorm),
    ("5e543c9f62fbfe5e",): Known(_plan_esmc, base=nn.LayerNorm),
    ("2e18422c8be3d845",): Known(forward=_convnext, base=nn.LayerNorm),
    ("fa9c95235b5ea5a2",): Known(forward=_eomt, base=nn.LayerNorm),
    ("b8c9ddac9d68da9e",): Known(_plan_timm, base=nn.LayerNorm),
    ("4eb24eac978b0418",): Known(forward=_timm_2d, base=nn.LayerNorm),
}
