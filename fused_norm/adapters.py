"""Which classes :func:`fused_norm.patch` knows, and the classes that take their place.

An adapter subclasses the class it replaces, has its names, and overrides ``forward`` alone. A class of transformers is
known by its code and not by its name: here and in ``adapters_blocks`` stand the forwards of transformers for which the
adapters were written, as functions that nobody calls, and a class is known if it is one of transformers' own and the
instructions of its forward are those of one of these functions. So a forward that another version of transformers
changes, or that somebody has patched, is left and reported, while a copy under another name (LlamaRMSNorm has some
140) is taken; and it works on any Python, and without source files, because both sides were compiled by the same one.

transformers is never imported here: a model that holds its classes has imported it.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as FF
from .modules import LayerNorm, RMSNorm

_HALF = (torch.bfloat16, torch.float16)
_FP32 = (torch.float32, *_HALF)  # what fp32 holds


# Codes that are compared


def instructions(function: Callable) -> tuple:
    """What ``function`` does, whatever its names, lines, annotations and docstring: comparable within one Python."""
    code = function.__code__

    def listed(code: types.CodeType) -> tuple:
        steps = []
        for step in dis.get_instructions(code):
            value = listed(step.argval) if isinstance(step.argval, types.CodeType) else step.argval
            steps.append((step.opname, type(value), value))
        return tuple(steps)

    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    flags = code.co_flags & (0x04 | 0x08)  # *args, **kwargs
    keywords = tuple(sorted((function.__kwdefaults__ or {}).items()))
    return names, code.co_posonlyargcount, code.co_kwonlyargcount, flags, function.__defaults__, keywords, listed(code)


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
    """One adapter: the methods it was written for, and what it does in place of the first, ``forward``."""

    stock: dict[str, tuple]  # method: its instructions
    plan: Callable | None = None  # of a norm: see Call
    forward: Callable | None = None  # or, where a plan does not say it, the adapter's forward
    base: type[nn.Module] | None = None  # the class is a direct subclass of this, where forward depends on it
    only: type[nn.Module] | None = None  # not a class of transformers, but this one of torch's
    norms: tuple[str, ...] = ()  # of a residual block: the attributes that hold norms; empty for a norm

    def knows(self, cls: type[nn.Module]) -> bool:
        if self.only not in (None, cls):
            return False
        if self.base is not None and cls.__bases__ != (self.base,):
            return False
        for name, expected in self.stock.items():
            method, _ = unwrapped(getattr(cls, name, None))
            if method is None or instructions(method) != expected:
                return False
            modules = {"torch": torch, "nn": nn, "F": F}
            if any(method.__globals__.get(name, module) is not module for name, module in modules.items()):
                return False
        return True


_KNOWN: list[Known] = []


def _recorded(stock: type) -> dict[str, tuple]:
    return {name: instructions(f) for name, f in vars(stock).items() if isinstance(f, types.FunctionType)}


def known(stock: type, **options: Any) -> Callable[[Callable], Callable]:
    """Decorate the forward that replaces that of classes whose methods are ``stock``'s."""

    def register(forward: Callable) -> Callable:
        _KNOWN.append(Known(_recorded(stock), forward=forward, **options))
        return forward

    return register


# The adapters' classes


@dataclass
class _Registry:
    adapters: dict[tuple, type | None] = field(default_factory=dict)  # a stock class, its forward: the adapter, or None
    stocks: dict[type, type] = field(default_factory=dict)  # an adapter: the stock class
    blocks: dict[type, tuple[str, ...]] = field(default_factory=dict)  # a block's adapter: Known.norms
    plans: dict[type, Callable] = field(default_factory=dict)  # a fused norm's class: Known.plan


_REGISTRY = _Registry()


def adapter(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The adapter of a class of transformers; None if there is none. Always the same class for the same class."""
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
    """The attributes that hold the norms of an adapter of residual blocks; empty for any other class."""
    return _REGISTRY.blocks.get(cls, ())


def is_transformers(cls: type) -> bool:
    """Whether transformers itself defines ``cls``: not code that came with a checkpoint, nor a user's subclass."""
    return cls.__module__.startswith("transformers.models.")


_TORCH = {cls: cls.forward for cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)}


def find(cls: type[nn.Module]) -> Known | None:
    """What is known of ``cls``, wherever it comes from."""
    return next((entry for entry in _KNOWN if entry.knows(cls)), None)


def _build(cls: type[nn.Module]) -> type[nn.Module] | None:
    # An adapter has its stock class's module, too. A forward of torch's that somebody replaced is not torch's.
    ours = _TORCH.get(cls) is cls.forward if cls in _TORCH else is_transformers(cls) and cls not in _REGISTRY.stocks
    entry = find(cls) if ours else None
    if entry is None:
        return None
    stock, adapted = cls.forward, entry.forward
    _, renamed = unwrapped(stock)
    if entry.plan is not None:
        plan = entry.plan

        def forward(self, *args, **kwargs):
            if kwargs or len(args) != 1:
                return stock(self, *args, **kwargs)
            (x,) = args
            call = plan(self, x.shape[-1], x.dtype) if isinstance(x, Tensor) and x.ndim else None
            return stock(self, x) if call is None else normalised(call, x)

    else:

        def forward(self, *args, **kwargs):
            if any(name in kwargs for name in renamed):  # stock's decorator says what is to be said, and renames it
                return stock(self, *args, **kwargs)
            return adapted(self, *args, **kwargs)

    # pickle looks a class up by its name, and finds the stock one there
    def __reduce_ex__(self, protocol):
        function, args, *rest = super(fused, self).__reduce_ex__(protocol)
        if function is copyreg.__newobj__ and args[0] is fused:
            return (_new, (cls, *args[1:]), *rest)
        return (function, args, *rest)

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": functools.wraps(unwrapped(stock)[0])(forward),
        "__reduce_ex__": __reduce_ex__,
    }
    fused = type(cls)(cls.__name__, (cls,), body)
    _REGISTRY.stocks[fused] = cls
    if entry.plan is not None:
        _REGISTRY.plans[fused] = entry.plan
    if entry.norms:
        _REGISTRY.blocks[fused] = entry.norms
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
    norm: nn.Module, x: Tensor, residual: Tensor, p: float = 0.0, training: bool = False
) -> tuple[Tensor, Tensor]:
    """``(norm(summed), summed)`` with ``summed = residual + dropout(x, p)``: in one call where ``norm`` is fused and
    nothing watches or replaces it, and as the separate operations of the stock block where not."""
    plan = _REGISTRY.plans.get(type(norm))
    if plan is not None and x.shape == residual.shape and _unwatched(norm):
        call = plan(norm, x.shape[-1], torch.promote_types(x.dtype, residual.dtype)) if x.ndim else None
        if call is not None and call.first is None:
            return _add_normalised(call, x, residual, p, training)
    summed = residual + F.dropout(x, p, training)
    return norm(summed), summed


def dropout_add_norm(norm: nn.Module, dropout: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`add_norm` where the block's dropout is a module."""
    if type(dropout) is nn.Dropout and not dropout.inplace and _unwatched(dropout):
        return add_norm(norm, x, residual, dropout.p, dropout.training)
    return add_norm(norm, dropout(x), residual)


def _plan_layer_norm(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call:
    return Call(False, module.normalized_shape, module.weight, module.bias, module.eps, autocast=True)


def _plan_rms_norm(module: nn.RMSNorm, n: int, dtype: torch.dtype) -> Call:
    return Call(True, module.normalized_shape, module.weight, None, module.eps, autocast=True)


_REGISTRY.plans[LayerNorm] = _plan_layer_norm
_REGISTRY.plans[RMSNorm] = _plan_rms_norm


def _known_norm(plan: Callable, base: type[nn.Module] | None = None) -> Callable[[type], type]:
    """Decorate the record of a norm of transformers: its methods, which ``plan`` replaces."""

    def register(stock: type) -> type:
        _KNOWN.append(Known(_recorded(stock), plan=plan, base=base))
        return stock

    return register


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


@_known_norm(_cast_then_weight("variance_epsilon"))
class _LlamaRMSNorm:
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


@_known_norm(_cast_then_weight("eps"))
class _Llama4TextRMSNorm:
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


@_known_norm(_cast_then_weight("eps"))
class _CpmAntLayerNorm:
    def forward(self, hidden_states):
        if hidden_states.size(-1) != self.dim_norm:
            raise AssertionError("hidden_states.size(-1) != self.dim_norm")
        old_dtype = hidden_states.dtype
        variance = hidden_states.to(torch.float32).pow(2).mean(dim=-1, keepdim=True)
        hidden_states = (hidden_states * torch.rsqrt(variance + self.eps)).to(old_dtype) * self.weight
        return hidden_states


@_known_norm(_weight_then_cast("variance_epsilon"))
class _Olmo2RMSNorm:
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


@_known_norm(_weight_then_cast("variance_epsilon"))
class _HeliumRMSNorm:
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight.to(torch.float32) * hidden_states).to(input_dtype)


@_known_norm(_weight_then_cast("eps"))
class _MoshiRMSNorm:
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * self.weight.float()
        return output.type_as(x)


@_known_norm(_weight_then_cast("eps", offset=1.0))
class _GemmaRMSNorm:
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


def _plan_gemma4(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    return _weight_then_cast("eps")(module, n, dtype) if module.with_scale else _no_weight(module, n, dtype)


@_known_norm(_plan_gemma4)
class _Gemma4RMSNorm:
    def _norm(self, hidden_states):
        mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
        return hidden_states * torch.pow(mean_squared, -0.5)

    def forward(self, hidden_states):
        normed_output = self._norm(hidden_states.float())
        if self.with_scale:
            normed_output = normed_output * self.weight.float()
        return normed_output.type_as(hidden_states)


@_known_norm(_no_weight)
class _NanoChatRMSNorm:
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x)


@_known_norm(_no_weight)
class _Inkling2UnweightedRMSNorm:
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        hidden_states = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.eps)
        return hidden_states.to(input_dtype)


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


@_known_norm(_plan_t5)
class _T5LayerNorm:
    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


def _plan_imagegpt(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """In x's own dtype throughout: below fp32 that is not what our kernels compute."""
    weight = module.weight
    if weight.shape != (n,) or weight.dtype != dtype or dtype not in (torch.float32, torch.float64):
        return None
    return Call(True, (n,), weight, None, module.eps)


@_known_norm(_plan_imagegpt)
class _ImageGPTLayerNorm:
    def forward(self, tensor):
        tensor = tensor / torch.sqrt(torch.mean(torch.square(tensor), axis=-1, keepdim=True) + self.eps)
        tensor = tensor * self.weight
        return tensor


def _plan_olmo(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    return Call(False, module.normalized_shape, None, None, 1e-5) if dtype in _FP32 else None


@_known_norm(_plan_olmo)
class _OlmoLayerNorm:
    def forward(self, hidden_states):
        orig_dtype = hidden_states.dtype
        return F.layer_norm(hidden_states.to(dtype=torch.float32), self.normalized_shape, None, None, eps=1e-5).to(
            orig_dtype
        )


def _plan_cohere(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """The weight of a norm of queries or keys is (heads, n)."""
    weight, eps = module.weight, module.variance_epsilon
    if dtype not in _FP32 or weight.dtype not in _FP32 or weight.shape[-1:] != (n,):
        return None
    if weight.ndim == 1:
        return Call(False, (n,), _beside(weight, dtype), None, eps)
    return Call(False, (n,), None, None, eps, first=torch.float32, times=weight.float(), last=dtype)


@_known_norm(_plan_cohere)
class _CohereLayerNorm:
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) * torch.rsqrt(variance + self.variance_epsilon)
        hidden_states = self.weight.to(torch.float32) * hidden_states
        return hidden_states.to(input_dtype)


def _plan_deberta(module: nn.Module, n: int, dtype: torch.dtype) -> Call | None:
    """Rounded once, where the stock forward of a half-precision model rounds three times."""
    weight, bias, eps = module.weight, module.bias, module.variance_epsilon
    if not _fits(weight, n, dtype) or not _fits(bias, n, dtype):
        return None
    if weight.dtype == bias.dtype == dtype:
        return Call(False, (n,), weight, bias, eps)
    return Call(False, (n,), None, None, eps, times=weight, plus=bias)


@_known_norm(_plan_deberta)
class _DebertaLayerNorm:
    def forward(self, hidden_states):
        input_type = hidden_states.dtype
        hidden_states = hidden_states.float()
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) / torch.sqrt(variance + self.variance_epsilon)
        hidden_states = hidden_states.to(input_type)
        y = self.weight * hidden_states + self.bias
        return y


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


@_known_norm(_plan_nemotron, base=nn.LayerNorm)
class _NemotronLayerNorm1P:
    def forward(self, input):
        device_type = input.device.type
        args = _cast_if_autocast_enabled(  # noqa: F821
            device_type, input, self.normalized_shape, self.weight + 1.0, self.bias, self.eps
        )
        with maybe_autocast(device_type=input.device.type, enabled=False):  # noqa: F821
            return F.layer_norm(*args)


def _plan_chameleon(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call:
    """The weight and the bias are (heads, n)."""
    shape = module.normalized_shape
    return Call(False, shape, None, None, 1e-5, times=module.weight, plus=module.bias, autocast=True)


@_known_norm(_plan_chameleon, base=nn.LayerNorm)
class _ChameleonLayerNorm:
    def forward(self, hidden_states):
        hidden_states = F.layer_norm(hidden_states, self.normalized_shape, None, None, eps=1e-5)
        hidden_states = hidden_states * self.weight + self.bias
        return hidden_states


def _plan_esmc(module: nn.LayerNorm, n: int, dtype: torch.dtype) -> Call:
    return _plan_layer_norm(module, n, dtype)._replace(last=dtype)


@_known_norm(_plan_esmc, base=nn.LayerNorm)
class _EsmcLayerNorm:
    def forward(self, hidden_states):
        return super().forward(hidden_states).to(hidden_states.dtype)


def _own_layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    return FF.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _ConvNextLayerNorm:
    def forward(self, features):
        if self.data_format == "channels_first":
            features = features.permute(0, 2, 3, 1)
            features = super().forward(features)
            features = features.permute(0, 3, 1, 2)
        else:
            features = super().forward(features)
        return features


@known(_ConvNextLayerNorm, base=nn.LayerNorm)
def _convnext(self, features):
    if self.data_format == "channels_first":
        return _own_layer_norm(self, features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return _own_layer_norm(self, features)


class _EomtLayerNorm2d:
    def forward(self, hidden_state):
        hidden_state = hidden_state.permute(0, 2, 3, 1)
        hidden_state = F.layer_norm(hidden_state, self.normalized_shape, self.weight, self.bias, self.eps)
        hidden_state = hidden_state.permute(0, 3, 1, 2)
        return hidden_state


@known(_EomtLayerNorm2d, base=nn.LayerNorm)
def _eomt(self, hidden_state):
    return _own_layer_norm(self, hidden_state.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
