"""Properties of layer_norm and rms_norm over random calls: any shape, layout, dtype, parameters and values.

Every result is held to a bound from the arithmetic itself (:class:`Bound`) against the fp64 truth, and where the sizes
make it meaningful to the rule of ``fused_norm.testing`` too. FUSED_NORM_TEST_SEED drives all draws (conftest.py): a
failure prints the command that replays it.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LOW_PRECISION, OPS, assert_same_bits, call, exception_of
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_norm
import fused_norm.functional as FF
from fused_norm.testing import NormResult, assert_norm_close, norm_truth

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

BACKENDS = [b for b in ("native", "torch", "reference") if fused_norm.available_backends()[b] is None]
if os.environ.get("TRITON_INTERPRET") == "1" and fused_norm.available_backends()["triton"] is None:
    BACKENDS.append("triton")

# ------------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Laid:
    """A view, and all the memory that it looks into."""

    view: Tensor
    memory: Tensor


def _in_larger(values: Tensor, dim: int, before: int, step: int, after: int) -> Laid:
    """``values`` as a slice of a larger tensor, which is NaN elsewhere: what reads beside the view shows."""
    shape = list(values.shape)
    shape[dim] = before + shape[dim] * step + after
    memory = torch.full(shape, float("nan"), dtype=values.dtype)
    index = [slice(None)] * values.dim()
    index[dim] = slice(before, before + values.shape[dim] * step, step)
    memory[tuple(index)] = values
    return Laid(memory[tuple(index)], memory)


def _transposed(values: Tensor) -> Laid:
    order = list(reversed(range(values.dim())))
    memory = values.permute(order).contiguous()
    return Laid(memory.permute(order), memory)


def _offset(values: Tensor) -> Laid:
    """Not aligned to anything wider than an element."""
    memory = torch.full((values.numel() + 3,), float("nan"), dtype=values.dtype)
    memory[1 : values.numel() + 1] = values.reshape(-1)
    return Laid(memory[1 : values.numel() + 1].view(values.shape), memory)


def _expanded(values: Tensor, dim: int) -> Laid:
    memory = values.narrow(dim, 0, min(1, values.shape[dim])).clone()
    return Laid(memory.expand(values.shape), memory)


def _whole(t: Tensor) -> Laid:
    return Laid(t, t)


LAYOUTS = {
    "contiguous": _whole,
    "transposed": _transposed,
    "first two exchanged": lambda v: _whole(v.transpose(0, -1).contiguous().transpose(0, -1)),
    "row-strided": lambda v: _in_larger(v, -1, 3, 1, 2),
    "every other column": lambda v: _in_larger(v, -1, 1, 2, 0),
    "every third row": lambda v: _in_larger(v, 0, 0, 3, 1),
    "misaligned": _offset,
    "expanded rows": lambda v: _expanded(v, 0),
    "expanded columns": lambda v: _expanded(v, -1),
    "flipped": lambda v: _whole(v.flip(0)[torch.arange(v.shape[0] - 1, -1, -1)]),
    "channels last": lambda v: _whole(v.to(memory_format=torch.channels_last)) if v.dim() == 4 else _transposed(v),
    "minus pending": lambda v: Laid(torch._neg_view(m := -v), m),
}
layouts = st.sampled_from(sorted(LAYOUTS))


# --------------------------------------------------------------------------------------------------------------- calls


@dataclass
class Call:
    """One drawn call."""

    op: str
    shape: tuple[int, ...]
    normalized: tuple[int, ...]
    dtype: torch.dtype
    param_dtype: torch.dtype
    eps: float
    scale: float
    offset: float
    seed: int
    layout: dict[str, str]
    grad: dict[str, bool]
    laid: dict[str, Laid] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        largest = torch.finfo(self.dtype).max / 4

        def randn(shape, dtype, scale=1.0, shift=0.0) -> Tensor:
            t = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
            return t.clamp(-largest, largest).to(dtype)

        values = {
            "x": randn(self.shape, self.dtype, self.scale, self.offset * self.scale),
            "dy": randn(self.shape, self.dtype),
            "weight": randn(self.normalized, self.param_dtype, 0.5, 1.0),
            "bias": randn(self.normalized, self.param_dtype),
        }
        self.laid = {name: LAYOUTS[layout](values[name]) for name, layout in self.layout.items()}

    @property
    def n(self) -> int:
        return math.prod(self.normalized)

    @property
    def rms(self) -> bool:
        return self.op == "rms_norm"

    def tensor(self, name: str) -> Tensor | None:
        return self.laid[name].view if name in self.laid else None

    def plain(self, name: str) -> Tensor | None:
        """The same values, contiguous."""
        return None if name not in self.laid else self.tensor(name).clone(memory_format=torch.contiguous_format)

    def run(self, namespace, tensors: dict[str, Tensor | None], everything: bool = False) -> NormResult:
        """Output and the gradients of what takes one, in the caller's hands rather than in ``.grad``."""
        leaves = {}
        for name in ("x", "weight", "bias"):
            t = tensors[name]
            leaves[name] = None if t is None else t.detach().requires_grad_(everything or self.grad[name])
        y = call(self.op, namespace, leaves["x"], self.normalized, leaves["weight"], leaves["bias"], self.eps)
        wanted = [name for name, t in leaves.items() if t is not None and t.requires_grad]
        assert y.requires_grad == bool(wanted)
        grads = torch.autograd.grad(y, [leaves[name] for name in wanted], tensors["dy"]) if wanted else ()
        found = dict(zip(wanted, grads, strict=True))
        return NormResult(y.detach(), *(found.get(name) for name in ("x", "weight", "bias")))


@st.composite
def calls(draw, empty: bool = False, dtypes=DTYPES) -> Call:
    op = draw(st.sampled_from(OPS))
    sizes = st.one_of(st.just(1), st.integers(1, 6))
    widths = st.one_of(st.just(1), st.integers(1, 9), st.integers(2, 40))
    normalized = tuple(draw(st.lists(widths, min_size=1, max_size=3)))
    while math.prod(normalized) > 2000:
        normalized = normalized[1:]
    if len(normalized) == 1 and draw(st.integers(0, 4)) == 0:
        normalized = (draw(st.integers(100, 1100)),)
    batch = draw(st.lists(sizes, min_size=0, max_size=3))
    if draw(st.integers(0, 5)) == 0:
        batch = [draw(st.integers(20, 70))]
    if empty and batch:
        batch[draw(st.integers(0, len(batch) - 1))] = 0
    dtype = draw(st.sampled_from(dtypes))
    mixed = dtype in LOW_PRECISION and draw(st.booleans())
    names = ["x", "dy", *draw(st.sampled_from([[], ["weight"], ["bias"], ["weight", "bias"]]))]
    names = [name for name in names if not (name == "bias" and op == "rms_norm")]
    return Call(
        op=op,
        shape=(*batch, *normalized),
        normalized=normalized,
        dtype=dtype,
        param_dtype=torch.float32 if mixed else dtype,
        eps=draw(st.sampled_from([1e-12, 1e-6, 1e-5, 0.1, 3.0])),
        scale=10.0 ** draw(st.integers(-3, 3)),
        offset=draw(st.sampled_from([0.0, 0.5, -3.0, 100.0])),
        seed=draw(st.integers(0, 2**31)),
        layout={name: draw(layouts) for name in names},
        grad={name: draw(st.booleans()) for name in ("x", "weight", "bias")},
    )


# ------------------------------------------------------------------------------------------------------------ the bound


class Bound:
    """How far each element may lie from the truth: a multiple of what rounding does in the arithmetic's own dtype.

    The mean errs by roundings of itself and of the row's spread, and so moves the whole row's xhat by ``moved`` units;
    every other operation errs relative to the numbers that it works on. The last rounding, to the result's dtype, comes
    on top. ``FACTOR`` is for the handful of operations and the growth of sums.
    """

    FACTOR = 8.0

    def __init__(self, c: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor) -> None:
        x, dy = x.double().reshape(-1, c.n), dy.double().reshape(-1, c.n)
        mean = torch.zeros_like(x[:, :1]) if c.rms else x.mean(-1, keepdim=True)
        self.rstd = ((x - mean).square().mean(-1, keepdim=True) + c.eps).rsqrt()
        self.xhat, self.dy = (x - mean) * self.rstd, dy
        self.w = torch.ones(c.n, dtype=torch.float64) if weight is None else weight.double().reshape(-1)
        self.b = torch.zeros(c.n, dtype=torch.float64) if bias is None else bias.double().reshape(-1)
        unit = torch.finfo(torch.float64 if c.dtype == torch.float64 else torch.float32).eps
        self.moved = torch.zeros_like(mean) if c.rms else 1 + mean.abs() * self.rstd
        self.unit = self.FACTOR * unit

    def y(self) -> Tensor:
        return self.unit * ((self.xhat.abs() + self.moved) * self.w.abs() + self.b.abs())

    def dx(self) -> Tensor:
        g = (self.dy * self.w).abs().amax(-1, keepdim=True)
        size = self.xhat.abs().amax(-1, keepdim=True).clamp_min(1)
        return self.unit * self.rstd * g * size.square() * (1 + self.moved)

    def dw(self) -> Tensor:
        return self.unit * (self.dy.abs() * (self.xhat.abs() + self.moved)).sum(0)

    def db(self) -> Tensor:
        return self.unit * self.dy.abs().sum(0)

    def check(self, name: str, actual: Tensor, truth: Tensor) -> None:
        a, t = actual.double().reshape(-1), truth.reshape(-1)
        info = torch.finfo(actual.dtype)
        limit = getattr(self, name)().expand(truth.reshape(self.shape(name)).shape).reshape(-1)
        limit = limit + 0.51 * info.eps * (t.abs() + limit) + info.smallest_normal * info.eps
        finite = t.abs() + limit < info.max  # beyond it the result may be infinite
        assert not a.isnan().any(), name
        wrong = finite & ((a - t).abs() > limit)
        if wrong.any():
            worst = int(((a - t).abs() / limit).where(finite, 0).argmax())
            raise AssertionError(f"{name}[{worst}] is {a[worst]}, the truth {t[worst]}, the bound {limit[worst]:.3g}")

    def shape(self, name: str) -> tuple[int, int]:
        return (-1, self.w.numel())


def _rule_applies(c: Call) -> bool:
    """Where the error relative to torch's own says something: enough numbers, and none lost by cancellation."""
    spread = not any(c.layout[name].startswith("expanded") for name in ("x", "dy"))
    return spread and c.n >= 16 and math.prod(c.shape) // c.n >= 16 and abs(c.offset) <= 3 and c.scale**2 > 100 * c.eps


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_a_strided_column_is_one_row(backend: str, op: str) -> None:
    """(6, 1) normalised over both dimensions, its elements not side by side: the output has x's shape all the same."""
    x = torch.randn(6, 2)[:, :1].detach().requires_grad_()
    dy = torch.randn(6, 1)
    with fused_norm.use_backend(backend):
        y = call(op, FF, x, (6, 1))
    assert y.shape == (6, 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.shape == (6, 1)


backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@settings(max_examples=120 if "triton" not in BACKENDS else 10)  # an interpreted kernel is slow
@given(c=calls())
def test_results(backend: str, c: Call) -> None:
    """Accuracy, and what every result promises of dtype, shape, layout and memory."""
    tensors = {name: c.tensor(name) for name in ("x", "weight", "bias", "dy")}
    # The interpreter truncates to bf16 where hardware rounds; test_triton.py gives it the hardware's conversion.
    assume(backend != "triton" or torch.bfloat16 not in (c.dtype, c.param_dtype))
    # torch's own layer_norm has no backward for an fp32 bias alone beside low-precision input.
    assume(backend != "torch" or c.param_dtype == c.dtype or "weight" in c.layout or "bias" not in c.layout)
    plain = {name: c.plain(name) for name in tensors}
    before = {name: laid.memory.clone() for name, laid in c.laid.items()}
    with fused_norm.use_backend(backend):
        result = c.run(FF, tensors)
        again = c.run(FF, tensors)
        contiguous = c.run(FF, plain)
        # The caller's .grad: there exactly where asked for, whatever the layout.
        leaves = {
            k: None if t is None else t.detach().requires_grad_(c.grad[k]) for k, t in tensors.items() if k != "dy"
        }
        y = call(c.op, FF, leaves["x"], c.normalized, leaves["weight"], leaves["bias"], c.eps)
        if y.requires_grad:
            y.backward(tensors["dy"])
    for name, t in leaves.items():
        assert t is None or (t.grad is not None) == c.grad[name]
        assert t is None or t.grad is None or (t.grad.shape == t.shape and t.grad.dtype == t.dtype)

    for name, laid in c.laid.items():
        assert_same_bits(laid.memory, before[name], f"{name} was written to")
    x = tensors["x"]
    assert result.y.shape == x.shape and result.y.dtype == x.dtype and result.y.is_contiguous()
    for name, of in (("dx", "x"), ("dw", "weight"), ("db", "bias")):
        gradient, source = getattr(result, name), tensors[of]
        assert (gradient is not None) == (source is not None and c.grad[of]), name
        if gradient is not None:
            assert gradient.shape == source.shape and gradient.dtype == source.dtype, name
            assert backend == "torch" or gradient.is_contiguous(), name
            others = [laid.memory for laid in c.laid.values()] + [result.y]
            assert gradient.untyped_storage().data_ptr() not in [t.untyped_storage().data_ptr() for t in others], name
    for name in ("y", "dx", "dw", "db"):
        assert_same_bits(getattr(again, name), getattr(result, name), f"{name} of a second call")
        if backend in ("native", "triton"):  # eager operations may add up strided rows in another order
            assert_same_bits(getattr(contiguous, name), getattr(result, name), f"{name} of contiguous copies")
    if backend == "torch":
        theirs = c.run(F, tensors)
        for name in ("y", "dx", "dw", "db"):
            a, e = getattr(result, name), getattr(theirs, name)
            if a is not None:
                # Strided parameters are laid out first, which may change the order of torch's own sums.
                unit = 4 * torch.finfo(a.dtype).eps
                torch.testing.assert_close(a, e, rtol=unit, atol=unit * max(1e-30, e.abs().nan_to_num().max().item()))
        return

    dy = plain["dy"]
    truth = norm_truth(plain["x"], plain["weight"], plain["bias"], dy, c.n, c.eps, c.rms)
    bound = Bound(c, plain["x"], plain["weight"], plain["bias"], dy)
    for name in ("y", "dx", "dw", "db"):
        if getattr(result, name) is not None:
            bound.check(name, getattr(result, name), getattr(truth, name))
    if _rule_applies(c) and c.dtype != torch.float64:  # in fp64 the truth itself is rounded
        assert_norm_close(result, truth, c.run(F, plain))


@backends
@settings(max_examples=30)
@given(c=calls(empty=True))
def test_results_of_empty_batches(backend: str, c: Call) -> None:
    """No rows: the shapes of torch, and parameter gradients of zeros."""
    assume(0 in c.shape)
    tensors = {name: c.tensor(name) for name in ("x", "weight", "bias", "dy")}
    with fused_norm.use_backend(backend):
        ours = c.run(FF, tensors)
    theirs = c.run(F, tensors)
    for name in ("y", "dx", "dw", "db"):
        a, e = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (e is None)
        if a is not None:
            assert_same_bits(a, e, name)


# ------------------------------------------------------------------------------------------------------ vmap as a loop


@backends
@settings(max_examples=60)
@given(
    op=st.sampled_from(OPS),
    rows=st.lists(st.integers(1, 4), max_size=2),
    normalized=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    batch=st.integers(1, 4),
    mapped=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    dims=st.tuples(*[st.integers(0, 3)] * 3),
    out_dim=st.integers(0, 3),
    gradient=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_vmap_is_a_loop(backend, op, rows, normalized, batch, mapped, dims, out_dim, gradient, seed) -> None:
    """Over any subset of the arguments, at any of their dimensions; of the function and of its gradient."""
    normalized = tuple(normalized)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*rows, *normalized), normalized, normalized][: 3 if op == "layer_norm" else 2]
    mapped = mapped[: len(shapes)]
    assume(any(mapped))
    tensors, in_dims = [], []
    for shape, is_mapped, dim in zip(shapes, mapped, dims, strict=False):
        dim = min(dim, len(shape))
        stacked = (*shape[:dim], batch, *shape[dim:]) if is_mapped else shape
        tensors.append(torch.randn(stacked, generator=generator, dtype=torch.float64))
        in_dims.append(dim if is_mapped else None)
    upstream = torch.randn(shapes[0], generator=generator, dtype=torch.float64)

    def function(*args: Tensor):
        y = call(op, FF, args[0], normalized, *args[1:])
        return (y * upstream).sin().sum() if gradient else y

    if gradient:
        function = torch.func.grad(function, argnums=tuple(range(len(tensors))))
    with fused_norm.use_backend(backend):
        out = 0 if gradient else min(out_dim, len(shapes[0]))
        got = torch.vmap(function, in_dims=tuple(in_dims), out_dims=out)(*tensors)
        each = [
            function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)))
            for i in range(batch)
        ]
    if not gradient:
        got, each = (got,), [(e,) for e in each]
    for i, g in enumerate(got):
        torch.testing.assert_close(g, torch.stack([e[i] for e in each], out), rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------- spoilt arguments


SPOILS = {
    "x of integers": lambda a: a | {"x": a["x"].long()},
    "x a scalar": lambda a: a | {"x": torch.tensor(1.0)},
    "x too short": lambda a: a | {"x": a["x"][..., :-1]},
    "x a list": lambda a: a | {"x": [1.0, 2.0]},
    "x None": lambda a: a | {"x": None},
    "x boolean": lambda a: a | {"x": a["x"] > 0},
    "x complex": lambda a: a | {"x": a["x"].to(torch.complex64)},
    "x a row of fewer dimensions": lambda a: a | {"x": a["x"][0] if a["x"].dim() else a["x"]},
    "shape empty": lambda a: a | {"shape": ()},
    "shape an int": lambda a: a | {"shape": 8},
    "shape of floats": lambda a: a | {"shape": (8.0,)},
    "shape a string": lambda a: a | {"shape": "8"},
    "shape None": lambda a: a | {"shape": None},
    "shape negative": lambda a: a | {"shape": (-1,)},
    "shape of another size": lambda a: a | {"shape": (7,)},
    "shape of more dimensions": lambda a: a | {"shape": (2, 3, 4, 8)},
    "shape a list": lambda a: a | {"shape": [8]},
    "shape of a bool": lambda a: a | {"shape": (True,)},
    "weight of another shape": lambda a: a | {"weight": torch.ones(7)},
    "weight of one element": lambda a: a | {"weight": torch.ones(1)},
    "weight of two dimensions": lambda a: a | {"weight": torch.ones(1, 8)},
    "weight fp64": lambda a: a | {"weight": torch.ones(8, dtype=torch.float64)},
    "weight bf16": lambda a: a | {"weight": torch.ones(8, dtype=torch.bfloat16)},
    "weight fp32": lambda a: a | {"weight": torch.ones(8)},
    "weight of integers": lambda a: a | {"weight": torch.ones(8, dtype=torch.int32)},
    "weight complex": lambda a: a | {"weight": torch.ones(8, dtype=torch.complex64)},
    "weight on meta": lambda a: a | {"weight": torch.ones(8, device="meta")},
    "weight a number": lambda a: a | {"weight": 1.0},
    "weight missing": lambda a: a | {"weight": None},
    "bias of another shape": lambda a: a | {"bias": torch.ones(7)},
    "bias fp16": lambda a: a | {"bias": torch.ones(8, dtype=torch.float16)},
    "bias fp32": lambda a: a | {"bias": torch.ones(8)},
    "bias a list": lambda a: a | {"bias": [0.0] * 8},
    "bias missing": lambda a: a | {"bias": None},
    "eps None": lambda a: a | {"eps": None},
    "eps a string": lambda a: a | {"eps": "small"},
    "eps a tensor": lambda a: a | {"eps": torch.tensor(1e-5)},
    "eps an int": lambda a: a | {"eps": 1},
    "eps complex": lambda a: a | {"eps": 1j},
    "eps negative": lambda a: a | {"eps": -1.0},
    "eps a bool": lambda a: a | {"eps": True},
}


def _errors(op: str, dtype: torch.dtype, spoils: tuple[str, ...], backend: str) -> list[BaseException | None] | None:
    """What torch's function and ours raise; None where what one spoils, the other cannot."""
    arguments = {
        "x": torch.arange(16.0).view(2, 8).to(dtype),
        "shape": (8,),
        "weight": torch.ones(8, dtype=dtype),
        "bias": torch.zeros(8, dtype=dtype) if op == "layer_norm" else None,
        "eps": 1e-5,
    }
    try:
        for spoil in spoils:
            arguments = SPOILS[spoil](arguments)
    except Exception:
        return None
    with fused_norm.use_backend(backend):
        return [exception_of(call, op, namespace, **arguments) for namespace in (F, FF)]


#: Faults that are open: torch's rms_norm looks at the weight's shape first, and makes a complex result.
OPEN = {("rms_norm", "shape of more dimensions"), ("rms_norm", "weight complex")}


def _one_spoil() -> list:
    reason = "another class than torch's, or an error where torch raises none"
    return [
        pytest.param(op, spoil, marks=[pytest.mark.xfail(strict=True, reason=reason)] if (op, spoil) in OPEN else [])
        for op in OPS
        for spoil in SPOILS
        if op == "layer_norm" or not spoil.startswith("bias")
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op, spoil", _one_spoil())
def test_a_spoilt_argument_raises_as_torch(op: str, spoil: str) -> None:
    """The class that torch raises, or no error where torch raises none."""
    for dtype in DTYPES:
        for backend in ("auto", *BACKENDS):
            theirs, ours = _errors(op, dtype, (spoil,), backend)
            assert type(ours) is type(theirs), (dtype, backend, theirs, ours)


@pytest.mark.xfail(strict=True, reason="which of two mistakes is complained of: torch reads eps's type first of all")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, phases=[Phase.generate])
@given(
    op=st.sampled_from(OPS),
    dtype=st.sampled_from(DTYPES),
    spoils=st.tuples(st.sampled_from(sorted(SPOILS)), st.sampled_from(sorted(SPOILS))),
    backend=st.sampled_from(["auto", *BACKENDS]),
)
def test_two_spoilt_arguments_raise_as_torch(op, dtype, spoils, backend) -> None:
    assume(op == "layer_norm" or not any(s.startswith("bias") for s in spoils))
    errors = _errors(op, dtype, spoils, backend)
    assume(errors is not None)
    assert type(errors[1]) is type(errors[0]), errors


# ------------------------------------------------------------------------------------------------------------- replays


def test_a_failure_prints_the_command_that_replays_it(tmp_path: Path) -> None:
    """A planted failing property: the seed it prints fails with the same example, in another run and another order."""
    (tmp_path / "test_planted.py").write_text(
        textwrap.dedent("""
            import torch
            from hypothesis import given, strategies as st

            def test_before():
                assert torch.rand(()) >= 0

            @given(st.integers(0, 10**9), st.floats(0, 1))
            def test_planted(number, other):
                assert number % 7 != 3 or number < 1000
        """)
    )
    tests = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k not in ("FUSED_NORM_TEST_SEED", "CI")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(Path(fused_norm.__file__).parents[1])])

    def run(*arguments: str, **variables: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", *arguments]
        done = subprocess.run(
            command, env=environment | variables, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout

    def example(output: str) -> str:
        return re.search(
            r"test_planted\(\s*(?:#.*\n)?.*?number=.*?other=.*?$", output, re.DOTALL | re.MULTILINE
        ).group()

    first = run()
    printed = re.search(r"replay with (\w+)=(\d+) python -m pytest '(\S+)'", first)
    assert printed, first
    variable, value, node = printed.groups()
    assert node == "test_planted.py::test_planted"
    assert example(run(node, **{variable: value})) == example(first)
    assert "@reproduce_failure" in first
    # Nothing is kept from one run for the next, which would hide what a seed finds.
    assert not list(tmp_path.rglob(".hypothesis/examples/*"))
