"""FF.ticks_loss and FF.ticks_cross_entropy against their definition in fp64 under autograd, and F.cross_entropy."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_same_bits, exception_of, leaf
from torch import Tensor

import fused_norm
import fused_norm.functional as FF
from fused_norm.testing import relative_error

REDUCTIONS = ("none", "sum", "mean")
IGNORE = -100

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

#: What auto takes: kernels where the extension is built. torch's place is taken by the reference's eager operations.
backends = pytest.mark.parametrize("backend", ["auto", "reference"])


@pytest.fixture(autouse=True)
def chosen(request: pytest.FixtureRequest):
    name = request.node.callspec.params.get("backend", "auto") if hasattr(request.node, "callspec") else "auto"
    with fused_norm.use_backend(name):
        yield


def test_the_torch_backend_serves_them() -> None:
    z, target = _draw(9, 7)
    with fused_norm.use_backend("torch"):
        for loss, ce, ticks in LOSSES.values():
            ours, theirs = leaf(z), leaf(z)
            a, b = loss(ours, target), _truth(theirs, target, ce, ticks)
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(torch.autograd.grad(a, ours), torch.autograd.grad(b, theirs))


def _truth(
    z: Tensor, target: Tensor, ce: float, ticks: float, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """By definition, with nothing clever: rows of logits in fp64, p = softmax, e = p - log p."""
    log_p = torch.log_softmax(z.double(), -1)
    keep = target != ignore_index
    log_pt = log_p.gather(-1, torch.where(keep, target, 0)[..., None])[..., 0]
    loss = torch.where(keep, ce * -log_pt + ticks * (log_pt.exp() - log_pt), 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / keep.sum()}[reduction]


#: (our function, c of cross entropy, l of ticks)
LOSSES = {
    "ticks_loss": (lambda z, t, **k: FF.ticks_loss(z, t, **k), 0.0, 1.0),
    "ticks_cross_entropy": (lambda z, t, **k: FF.ticks_cross_entropy(z, t, **k), 1.0, 1e-3),
    "ticks_weight=0.7": (lambda z, t, **k: FF.ticks_cross_entropy(z, t, ticks_weight=0.7, **k), 1.0, 0.7),
    "ticks_weight=0": (lambda z, t, **k: FF.ticks_cross_entropy(z, t, ticks_weight=0.0, **k), 1.0, 0.0),
}
losses = pytest.mark.parametrize("loss, ce, ticks", LOSSES.values(), ids=LOSSES)


def _draw(rows: int, classes: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    z = (torch.randn(rows, classes, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(classes, (rows,))
    target[1::4] = IGNORE
    return z, target


# ------------------------------------------------------------------------------------------------ values and gradients


@losses
@reductions
@backends
@pytest.mark.parametrize("rows, classes", [(1, 2), (7, 5), (33, 100), (4, 5000), (64, 1)])
def test_values_and_gradients(loss, ce, ticks, reduction: str, backend: str, rows: int, classes: int) -> None:
    z, target = _draw(rows, classes)
    target[0] = classes - 1
    ours, theirs = leaf(z), leaf(z)
    a = loss(ours, target, reduction=reduction)
    b = _truth(theirs, target, ce, ticks, reduction=reduction)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(b.shape, dtype=torch.float64)
    a.backward(upstream)
    b.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)


@losses
@backends
@all_dtypes
def test_accuracy(loss, ce, ticks, backend: str, dtype: torch.dtype) -> None:
    """Loss and gradient lie within a few roundings of the fp64 truth; the loss has the logits' dtype."""
    z, target = _draw(33, 1000, dtype)
    ours, theirs = leaf(z), leaf(z.double())
    a, b = loss(ours, target, reduction="none"), _truth(theirs, target, ce, ticks, reduction="none")
    assert a.dtype == dtype == F.cross_entropy(z, target).dtype
    upstream = torch.randn(33, dtype=torch.float64).to(dtype)
    a.backward(upstream)
    b.backward(upstream.double())
    assert ours.grad.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(a.double(), b, rtol=4 * unit, atol=4 * unit)
    tiny = 6e-8 if dtype == torch.float16 else 0.0  # fp16's smallest subnormal
    for row in range(33):
        truth = theirs.grad[row]
        error = (ours.grad[row].double() - truth).norm() / truth.norm().clamp_min(1e-300)
        assert target[row] == IGNORE or error <= 20 * unit + tiny * 1000**0.5 / truth.norm(), (row, error)


@losses
@all_dtypes
def test_cross_entropy_is_the_ticks_weight_0_case(loss, ce, ticks, dtype: torch.dtype) -> None:
    """and with it, ``ticks_cross_entropy = CE + ticks_weight * ticks_loss``, of values and of gradients."""
    if ce == 0:
        pytest.skip("ticks alone")
    z, target = _draw(20, 50, dtype)
    for reduction in REDUCTIONS:
        leaves = [leaf(z) for _ in range(3)]
        whole = loss(leaves[0], target, reduction=reduction)
        parts = (
            F.cross_entropy(leaves[1], target, reduction=reduction),
            FF.ticks_loss(leaves[2], target, reduction=reduction),
        )
        unit = torch.finfo(dtype).eps
        expected = parts[0].double() + ticks * parts[1].double()
        torch.testing.assert_close(whole.double(), expected, rtol=4 * unit, atol=8 * unit)
        for t in (whole, *parts):
            t.backward(torch.ones_like(t))
        grad = leaves[1].grad.double() + ticks * leaves[2].grad.double()
        torch.testing.assert_close(
            leaves[0].grad.double(), grad, rtol=8 * unit, atol=4 * unit * grad.abs().max().item()
        )


def test_the_pure_loss_has_its_floor_at_1() -> None:
    z = torch.tensor([[60.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    e = FF.ticks_loss(z, torch.tensor([0, 0]), reduction="none")
    third = 1 / 3 + torch.log(torch.tensor(3.0))
    torch.testing.assert_close(e, torch.stack([torch.tensor(1.0), third]), rtol=1e-6, atol=0.0)


@backends
@pytest.mark.parametrize("top", [4.0, 16.0, 40.0, 80.0])
@pytest.mark.parametrize("classes", [4, 1000])
@pytest.mark.parametrize("where", ["first", "last"])
def test_gradient_of_a_well_predicted_token(backend: str, top: float, classes: int, where: str) -> None:
    """1 - p_t is 3.4e-7 at z = (16, 0, 0, 0), where 1 - exp(z_t - lse) and -expm1(z_t - lse) are 0 in fp32."""
    index = 0 if where == "first" else classes - 1
    z = torch.zeros(1, classes)
    z[0, index] = top
    q = (classes - 1) / (classes - 1 + torch.tensor(top, dtype=torch.float64).exp())
    other = q * q / (classes - 1)  # the others' p sum to q
    truth = torch.full((1, classes), other.item(), dtype=torch.float64)
    truth[0, index] = -q * q
    ours = leaf(z)
    FF.ticks_loss(ours, torch.tensor([index]), reduction="sum").backward()
    # An exponent of size ``top`` in fp32 costs up to top * 2^-24 relative, and the gradient is a product of two.
    limit = 1e-6 if (top, classes) == (16.0, 4) else max(1e-6, 4 * top * torch.finfo(torch.float32).eps)
    representable = truth.abs() > 1e-37
    relative = (ours.grad.double() - truth).abs()[representable] / truth.abs()[representable]
    assert (ours.grad != 0)[representable].all()
    assert relative.numel() == 0 or relative.max() < limit
    if top == 16.0 and classes == 4:
        assert q.item() == pytest.approx(3.376e-7, rel=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_any_offset_of_the_logits(offset: float) -> None:
    """softmax does not see an offset; exp of the bare logits would overflow."""
    z = torch.randint(-8, 8, (9, 20)).float()
    target = torch.randint(20, (9,))
    results = []
    for shift in (0.0, offset):
        ours = leaf(z + shift)
        e = FF.ticks_cross_entropy(ours, target, reduction="none", ticks_weight=0.5)
        e.sum().backward()
        results.append((e, ours.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if offset else 0.0, atol=2e-3 if offset else 0.0)


@losses
def test_gradcheck(loss, ce, ticks) -> None:
    z, target = _draw(5, 6)
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(lambda t, r=reduction: loss(t, target, reduction=r), leaf(z), fast_mode=True)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda t: loss(t, torch.randint(3, (2, 4), generator=torch.Generator().manual_seed(0))), leaf(z)
    )


@losses
def test_gradgradcheck(loss, ce, ticks) -> None:
    z, target = _draw(4, 5)
    assert torch.autograd.gradgradcheck(lambda t: loss(t, target), leaf(z), fast_mode=True)


@losses
def test_higher_derivatives_and_transforms(loss, ce, ticks) -> None:
    z, target = _draw(4, 5)

    def ours(t: Tensor) -> Tensor:
        return loss(t, target)

    def theirs(t: Tensor) -> Tensor:
        return _truth(t, target, ce, ticks)

    direction = torch.randn_like(z)
    for transform in (
        torch.func.grad,
        torch.func.hessian,
        lambda f: lambda t: torch.func.jvp(f, (t,), (direction,)),
        lambda f: lambda t: torch.vmap(f)(torch.stack([t, 2 * t])),
        lambda f: lambda t: torch.vmap(torch.func.grad(f))(torch.stack([t, 2 * t])),
    ):
        for a, e in zip(*(torch.utils._pytree.tree_leaves(transform(f)(z)) for f in (ours, theirs)), strict=True):
            assert e.abs().max() > 0
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- shapes


SHAPES = {
    "(M, V)": ((6, 9), (6,)),
    "(V,)": ((9,), ()),
    "(N, C, d1)": ((3, 9, 4), (3, 4)),
    "(N, C, d1, d2)": ((3, 9, 4, 5), (3, 4, 5)),
    "one row": ((1, 9), (1,)),
    "one class": ((6, 1), (6,)),
}


@losses
@reductions
@pytest.mark.parametrize("shape, target_shape", SHAPES.values(), ids=SHAPES)
def test_shapes(loss, ce, ticks, reduction: str, shape, target_shape) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(classes, target_shape)
    ours, theirs = leaf(z), leaf(z)
    a = loss(ours, target, reduction=reduction)
    rows = theirs if theirs.dim() < 3 else theirs.movedim(1, -1)
    b = _truth(rows, target, ce, ticks, reduction=reduction)
    assert a.shape == b.shape == F.cross_entropy(z, target, reduction=reduction).shape
    torch.testing.assert_close(a, b)
    upstream = torch.randn(b.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(a, ours, upstream), torch.autograd.grad(b, theirs, upstream))


def test_layouts() -> None:
    wide = torch.randn(12, 40, dtype=torch.float64)
    views = {
        "transposed": torch.randn(9, 6, dtype=torch.float64).t(),
        "row-strided": wide[:6, 3:12],
        "every other row": wide[::2, :9],
        "every other column": wide[:6, :18:2],
        "expanded": torch.randn(1, 9, dtype=torch.float64).expand(6, 9),
    }
    target = torch.randint(9, (12,))[::2]
    for name, z in views.items():
        ours, theirs = z.detach().requires_grad_(), leaf(z)
        upstream = torch.randn(1, dtype=torch.float64).expand(6)
        a, b = (FF.ticks_cross_entropy(t, target, reduction="none", ticks_weight=0.5) for t in (ours, theirs))
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(a, _truth(z, target, 1.0, 0.5, reduction="none"))
        torch.testing.assert_close(torch.autograd.grad(a, ours, upstream), torch.autograd.grad(b, theirs, upstream))


@losses
@all_dtypes
@pytest.mark.parametrize(
    "shape, target_shape", [((0, 5), (0,)), ((0, 5, 3), (0, 3)), ((3, 5, 0), (3, 0)), ((0, 0), (0,))], ids=str
)
def test_empty(loss, ce, ticks, dtype: torch.dtype, shape, target_shape) -> None:
    target = torch.zeros(target_shape, dtype=torch.int64)
    for reduction in REDUCTIONS:
        z = torch.zeros(shape, dtype=dtype, requires_grad=True)
        ours = loss(z, target, reduction=reduction)
        theirs = F.cross_entropy(z.detach(), target, reduction=reduction)
        assert_same_bits(ours.detach(), theirs)
        ours.backward(torch.ones_like(ours))
        assert z.grad.shape == z.shape
    assert loss(z, target).isnan() and loss(z, target, reduction="sum") == 0


# ------------------------------------------------------------------------------------------ ignored rows, NaN, infinity


@losses
@backends
@all_dtypes
def test_all_rows_ignored(loss, ce, ticks, backend: str, dtype: torch.dtype) -> None:
    target = torch.full((4,), IGNORE)
    for reduction, value in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
        z = torch.randn(4, 7).to(dtype).requires_grad_()
        out = loss(z, target, reduction=reduction)
        assert_same_bits(out.detach(), torch.full_like(out, value))
        out.backward(torch.ones_like(out))
        assert_same_bits(z.grad, torch.zeros_like(z), "gradients are exactly zero")


@losses
@reductions
@backends
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_ignored_rows_get_exactly_zero_gradient_whatever_they_hold(
    loss, ce, ticks, reduction: str, backend: str, poison: float
) -> None:
    """torch gives NaN here; and the other rows do not notice."""
    z, target = _draw(9, 6, torch.float32)
    clean = leaf(z)
    loss(clean, target, reduction=reduction).sum().backward()
    z[target == IGNORE] = poison
    z[1, :3] = float("nan")
    ours = leaf(z)
    out = loss(ours, target, reduction=reduction)
    assert out.isfinite().all()
    out.sum().backward()
    assert (target == IGNORE).sum() == 2
    assert (ours.grad[target == IGNORE] == 0).all()
    torch.testing.assert_close(ours.grad, clean.grad, rtol=0, atol=0)


@losses
@pytest.mark.parametrize("ignore_index", [2, 0, -1, 99])
def test_any_ignore_index(loss, ce, ticks, ignore_index: int) -> None:
    """Also a real class, and numbers that are no class."""
    z = torch.randn(8, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 2, 0, 1])
    target[3] = ignore_index
    for reduction in REDUCTIONS:
        ours, theirs = leaf(z), leaf(z)
        a = loss(ours, target, ignore_index=ignore_index, reduction=reduction)
        b = _truth(theirs, target, ce, ticks, ignore_index, reduction)
        torch.testing.assert_close(a, b)
        upstream = torch.randn(b.shape, dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(a, ours, upstream), torch.autograd.grad(b, theirs, upstream))


@losses
@backends
@all_dtypes
def test_a_masked_class_that_is_not_the_target(loss, ce, ticks, backend: str, dtype: torch.dtype) -> None:
    z = torch.randn(6, 8).to(dtype)
    z[:, 3] = float("-inf")
    z[2, [0, 1, 4, 5, 6, 7]] = float("-inf")  # the target alone is left: p = 1
    target = torch.tensor([0, 1, 2, 4, 5, 6])
    ours = leaf(z)
    out = loss(ours, target, reduction="none")
    assert out.isfinite().all() and out[2] == ticks
    out.sum().backward()
    assert ours.grad.isfinite().all()
    assert (ours.grad[:, 3] == 0).all() and (ours.grad[2] == 0).all()
    theirs = leaf(torch.where(z.isinf(), torch.full_like(z, -1e4), z).double())
    _truth(theirs, target, ce, ticks, reduction="sum").backward()
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


@losses
@backends
def test_a_masked_target_costs_infinitely_much(loss, ce, ticks, backend: str) -> None:
    z = torch.randn(3, 5)
    z[1, 2] = float("-inf")
    out = loss(z, torch.tensor([0, 2, 4]), reduction="none")
    assert out[1] == float("inf") and out[[0, 2]].isfinite().all()
    assert F.cross_entropy(z, torch.tensor([0, 2, 4]), reduction="none")[1] == float("inf")


@losses
def test_nan_stays_in_its_row(loss, ce, ticks) -> None:
    z, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    z[1, 4] = float("nan")
    ours = leaf(z)
    out = loss(ours, target, reduction="none")
    out.sum().backward()
    assert out.isnan().tolist() == [False, True, False, False]
    assert ours.grad.isnan().any(1).tolist() == [False, True, False, False]


# --------------------------------------------------------------------------------------------------------------- weight


@losses
@reductions
def test_class_weights(loss, ce, ticks, reduction: str) -> None:
    """Each row counts with its target's weight, and the mean is the weighted mean."""
    z, target = _draw(20, 6)
    w = torch.rand(6, dtype=torch.float64)
    try:
        ours = leaf(z)
        a = loss(ours, target, weight=w, reduction=reduction)
    except NotImplementedError as error:
        assert "weight" in str(error)
        pytest.skip("class weights are not there yet, and say so")
    theirs = leaf(z)
    row_weight = torch.where(target == IGNORE, 0.0, w[target.clamp_min(0)])
    rows = _truth(theirs, target, ce, ticks, reduction="none") * row_weight
    b = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / row_weight.sum()}[reduction]
    torch.testing.assert_close(a, b)
    upstream = torch.randn(b.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(a, ours, upstream), torch.autograd.grad(b, theirs, upstream))
    if ticks == 0:
        torch.testing.assert_close(a, F.cross_entropy(z, target, w, reduction=reduction))


# ------------------------------------------------------------------------------------------------------------- errors


@losses
@reductions
@backends
@pytest.mark.parametrize("bad", [5, 6, 1000, -1, -99, 2**40, -(2**40)])
def test_target_out_of_range(loss, ce, ticks, reduction: str, backend: str, bad: int) -> None:
    z, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    target[2] = bad
    with pytest.raises(IndexError, match=str(bad)) as caught:
        loss(z, target, reduction=reduction)
    assert type(caught.value) is type(exception_of(F.cross_entropy, z, target, reduction=reduction))
    assert "5" in str(caught.value)
    with pytest.raises(IndexError):  # the default's own number is out of range when another is ignored
        loss(z, torch.tensor([0, 1, IGNORE, 3]), ignore_index=2, reduction=reduction)


_Z, _T = torch.randn(3, 5), torch.tensor([0, 1, 4])
#: name: (arguments, keywords, what the message says)
BAD = {
    "fewer targets": ((_Z, _T[:2]), {}, ("3", "2")),
    "more targets": ((_Z, torch.zeros(7, dtype=torch.int64)), {}, ("3", "7")),
    "target of another shape": ((torch.randn(2, 5, 3, 4), torch.zeros(2, 4, 3, dtype=torch.int64)), {}, ("3", "4")),
    "target with a dimension more": ((_Z, _T[:, None]), {}, ()),
    "target for a batch, one row of logits": ((_Z[0], _T), {}, ()),
    "0-d input": ((torch.tensor(1.0), torch.tensor(0)), {}, ()),
    "int32 target": ((_Z, _T.int()), {}, ("(?i)int",)),
    "bool target": ((_Z, _T.bool()), {}, ("(?i)bool",)),
    "int input": ((_Z.long(), _T), {}, ("int64|Long",)),
    "bool input": ((_Z.bool(), _T), {}, ("(?i)bool",)),
    "complex input": ((_Z.to(torch.complex64), _T), {}, ("(?i)complex",)),
    "unknown reduction": ((_Z, _T), {"reduction": "avg"}, ("avg",)),
    "reduction None": ((_Z, _T), {"reduction": None}, ("None",)),
    "input a list": (([[1.0, 2.0]], _T), {}, ("list",)),
    "target a list": ((_Z, [0, 1, 4]), {}, ("list",)),
    "target on another device": ((_Z, _T.to("meta")), {}, ("meta", "cpu")),
    "no classes": ((torch.randn(3, 0), _T), {}, ()),
}


@pytest.mark.parametrize("args, kwargs, says", BAD.values(), ids=BAD)
@pytest.mark.parametrize("function", [FF.ticks_loss, FF.ticks_cross_entropy], ids=["ticks_loss", "ticks_cross_entropy"])
def test_bad_arguments_raise_as_cross_entropy_does(function, args, kwargs, says) -> None:
    theirs = exception_of(F.cross_entropy, *args, **kwargs)
    assert theirs is not None
    with pytest.raises(type(theirs)) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is type(theirs), caught.value
    for pattern in says:
        caught.match(pattern)


@pytest.mark.parametrize("function", [FF.ticks_loss, FF.ticks_cross_entropy], ids=["ticks_loss", "ticks_cross_entropy"])
def test_what_cross_entropy_takes_beside_the_usual(function) -> None:
    """uint8 targets; a target of one element for one row of logits."""
    torch.testing.assert_close(function(_Z, _T.to(torch.uint8)), function(_Z, _T))
    torch.testing.assert_close(function(_Z[0], _T[:1]), function(_Z[0], _T[0]))


# --------------------------------------------------------------------------------------------------- around the call


@losses
def test_nothing_of_the_callers_is_changed(loss, ce, ticks) -> None:
    z, target = _draw(6, 5, torch.float32)
    before = z.clone(), target.clone()
    ours = z.requires_grad_()
    loss(ours, target).backward()
    assert_same_bits(ours.detach(), before[0])
    assert_same_bits(target, before[1])


@losses
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(loss, ce, ticks, mode) -> None:
    z, target = _draw(6, 5, torch.float32)
    with mode():
        out = loss(leaf(z), target)
    assert not out.requires_grad
    torch.testing.assert_close(out.clone().double(), _truth(z, target, ce, ticks), rtol=1e-5, atol=1e-5)


@losses
def test_mutating_the_logits_before_backward_raises(loss, ce, ticks) -> None:
    z, target = _draw(6, 5, torch.float32)
    ours = leaf(z)
    out = loss(ours, target)
    with torch.no_grad():
        ours.add_(1)
    try:
        out.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:  # what was saved is not the logits: then the gradient must be that of the old ones
        theirs = leaf(z)
        _truth(theirs, target, ce, ticks).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_returns_fp32(loss, ce, ticks, dtype: torch.dtype, device: str) -> None:
    z, target = (t.to(device) for t in _draw(6, 5, dtype))
    with torch.autocast(device, torch.bfloat16):
        ours = leaf(z)
        out = loss(ours, target)
        assert out.dtype == torch.float32 == F.cross_entropy(z, target).dtype
    out.backward()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(out.double(), _truth(z, target, ce, ticks), rtol=1e-5, atol=1e-5)


@losses
def test_compile_fullgraph(loss, ce, ticks) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, t: loss(z * 2, t), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        z, target = _draw(rows, 5)
        ours, theirs = leaf(z), leaf(z)
        a, b = compiled(ours, target), _truth(theirs * 2, target, ce, ticks)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, ours), torch.autograd.grad(b, theirs))


@losses
def test_runs_repeat_bit_for_bit(loss, ce, ticks) -> None:
    z, target = _draw(300, 500, torch.float32)
    results = []
    for _ in range(2):
        ours = leaf(z)
        out = loss(ours, target)
        out.backward()
        results.append((out.detach(), ours.grad))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@losses
def test_rows_do_not_see_each_other(loss, ce, ticks) -> None:
    z, target = _draw(40, 300, torch.float32)
    whole = loss(z, target, reduction="none")
    for start, stop in itertools.pairwise((0, 1, 3, 10, 40)):
        assert_same_bits(loss(z[start:stop], target[start:stop], reduction="none"), whole[start:stop])


def test_training_with_it_learns() -> None:
    """Ten steps down the gradient of each loss bring it down, and the truth with it."""
    features, target = torch.randn(64, 10), torch.randint(4, (64,))
    for loss, ce, ticks in LOSSES.values():
        w = torch.zeros(10, 4, requires_grad=True)
        history = []
        for _ in range(10):
            out = loss(features @ w, target)
            (grad,) = torch.autograd.grad(out, w)
            with torch.no_grad():
                w -= 0.5 * grad
            history.append(out.item())
        assert all(b < a for a, b in itertools.pairwise(history)), history
        assert _truth(features @ w, target, ce, ticks) < history[0]


@pytest.mark.gpu
@losses
@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_target_out_of_range_on_cuda_reads_nothing_out_of_bounds(loss, ce, ticks, bad: int) -> None:
    """No promise but this: whatever comes back, and the device works afterwards."""
    z = torch.randn(4, 5, device="cuda", requires_grad=True)
    target = torch.tensor([0, 1, bad, 3], device="cuda")
    loss(z, target, reduction="none").sum().backward()
    torch.cuda.synchronize()
    keep = [0, 1, 3]
    theirs = leaf(z)
    _truth(theirs[keep], target[keep], ce, ticks, reduction="sum").backward()
    torch.testing.assert_close(z.grad[keep], theirs.grad[keep], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- what a review once found wrong


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e30])
def test_an_offset_of_the_logits_costs_no_digits(offset: float) -> None:
    z, target = (torch.randn(64, 1000) * 2 + offset).requires_grad_(), torch.randint(1000, (64,))
    truth = leaf(z.detach().double())
    (exact,) = torch.autograd.grad(F.cross_entropy(truth, target), truth)
    (theirs,) = torch.autograd.grad(F.cross_entropy(z, target), z)
    (ours,) = torch.autograd.grad(FF.ticks_cross_entropy(z, target, ticks_weight=0.0), z)
    assert relative_error(ours, exact) <= max(1.5 * relative_error(theirs, exact), 5e-8)


def _eager(function, z: Tensor) -> Tensor:
    z = leaf(z)
    return torch.autograd.grad(function(z), z)[0]


def _double(function, z: Tensor) -> Tensor:
    z = leaf(z)
    (first,) = torch.autograd.grad(function(z), z, create_graph=True)
    return torch.autograd.grad(first.square().sum(), z)[0]


MODES = {
    "eager": _eager,
    "double": _double,
    "func": lambda function, z: torch.func.grad(function)(z),
    "compiled": lambda function, z: _eager(torch.compile(function, backend="aot_eager", fullgraph=True), z),
}


@losses
@pytest.mark.parametrize("mode", MODES)
def test_nan_in_an_ignored_row_reaches_no_gradient(loss, ce, ticks, mode: str) -> None:
    z, target = torch.randn(3, 5), torch.tensor([1, IGNORE, 2])
    z[1] = float("nan")
    gradient = MODES[mode](lambda z: loss(z, target), z)
    assert torch.equal(gradient[1], torch.zeros(5)) and gradient.isfinite().all() and gradient[0].abs().max() > 0


@pytest.mark.parametrize("mode", ["eager", "func", "compiled"])
@pytest.mark.parametrize("z_t", [2.0, 5.0, 10.0, 16.0, 20.0, 30.0])
def test_gradient_of_a_token_predicted_well(z_t: float, mode: str) -> None:
    z, target = torch.tensor([[z_t, 0.0, 0.0, 0.0]]), torch.tensor([0])
    q = 3 / (3 + torch.tensor(z_t, dtype=torch.float64).exp())
    gradient = MODES[mode](lambda z: FF.ticks_loss(z, target), z)
    torch.testing.assert_close(gradient[0, 0].double(), -q * q, rtol=5e-6, atol=0)
