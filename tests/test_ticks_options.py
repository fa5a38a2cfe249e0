"""The ticks losses' options in combination, against their definition in fp64; dtypes, memory, modules and Trainer."""

from __future__ import annotations

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LOW_PRECISION, assert_same_bits, exception_of, leaf
from torch import Tensor, nn

import fused_norm
import fused_norm.functional as FF
from fused_norm.testing import relative_error

REDUCTIONS = ("none", "sum", "mean")
IGNORE = -100
KINDS = ("hard", "soft")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
kinds = pytest.mark.parametrize("kind", KINDS)


def truth(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ce: float = 1.0,
    ticks: float = 1e-3,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """By definition, in z's dtype: rows (M, V), p = softmax, a mass for each class."""
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p, classes = torch.log_softmax(z, 1), z.shape[1]
    if target.is_floating_point():
        keep = torch.ones(len(z), dtype=torch.bool, device=z.device)
        mass, divisor = target, keep.sum()
    else:
        keep = target != IGNORE
        index = torch.where(keep, target, 0)
        mass = F.one_hot(index, classes).to(z.dtype)
        divisor = (keep if weight is None else keep * weight[index]).sum()
    mass = (1 - label_smoothing) * mass + label_smoothing / classes
    mass = mass if weight is None else mass * weight
    loss = (mass * (ticks * (log_p.exp() - log_p) - ce * log_p)).sum(1) * keep
    z_loss = z_loss_weight * torch.logsumexp(z, 1).square() * keep
    if reduction == "none":
        return loss + z_loss
    return (loss + z_loss).sum() if reduction == "sum" else loss.sum() / divisor + z_loss.sum() / keep.sum()


def draw(kind: str, rows: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    z = (torch.randn(rows, classes, dtype=torch.float64) * 3).to(dtype)
    if kind == "soft":
        return z, torch.softmax(torch.randn(rows, classes, dtype=torch.float64) * 2, 1).to(dtype)
    target = torch.randint(classes, (rows,))
    target[1::4] = IGNORE
    return z, target


# ------------------------------------------------------------------------------------------- values, first derivatives


@pytest.mark.parametrize("reduction", REDUCTIONS)
@kinds
def test_options_in_every_combination(place, kind: str, reduction: str) -> None:
    z, target = (t.to(place.device) for t in draw(kind, 9, 11))
    class_weights = torch.rand(11, dtype=torch.float64, device=place.device)
    for smoothing, weight, z_loss, softcap, ticks in itertools.product(
        (0.0, 0.2, 1.0), (None, class_weights), (0.0, 0.3), (None, 2.5), (0.0, 0.7)
    ):
        options = {"label_smoothing": smoothing, "reduction": reduction, "z_loss_weight": z_loss, "softcap": softcap}
        ours, theirs = [leaf(z)], [leaf(z)]
        if kind == "soft":
            ours, theirs = [*ours, leaf(target)], [*theirs, leaf(target)]
        a = FF.ticks_cross_entropy(ours[0], [target, ours[-1]][kind == "soft"], weight, ticks_weight=ticks, **options)
        b = truth(theirs[0], [target, theirs[-1]][kind == "soft"], weight, ticks=ticks, **options)
        what = f"{options}, weight {weight is not None}, ticks {ticks}"
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")
        upstream = torch.randn(b.shape, dtype=torch.float64, device=place.device)
        grads = zip(torch.autograd.grad(a, ours, upstream), torch.autograd.grad(b, theirs, upstream), strict=True)
        for x, y in grads:
            assert relative_error(x, y) < 1e-10, what
        if ticks == 0.0 and z_loss == 0.0 and softcap is None:
            expected = F.cross_entropy(z, target, weight, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(a, expected, rtol=1e-12, atol=1e-12)
        if z_loss == 0.0 and softcap is None:
            pure = FF.ticks_loss(z, target, weight, reduction=reduction, label_smoothing=smoothing)
            expected = truth(z, target, weight, reduction, smoothing, ce=0.0, ticks=1.0)
            torch.testing.assert_close(pure, expected, rtol=1e-11, atol=1e-12)


def _gradient(function, z: Tensor, target: Tensor, upstream: Tensor, **options) -> tuple[Tensor, Tensor]:
    z = leaf(z)
    out = function(z, target, **options)
    return out.detach(), *torch.autograd.grad(out, z, upstream.to(out.dtype).expand(out.shape))


#: How far a gradient may lie from the truth, and how many times as far as the eager formula's, by dtype.
LIMITS = {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FACTORS = {torch.float32: 1.5, torch.bfloat16: 1.05, torch.float16: 1.05}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@kinds
@all_dtypes
@pytest.mark.parametrize("shape", [(1, 7), (33, 1000), (4, 30522), (2, 128256)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_accuracy(device: str, shape, dtype: torch.dtype, kind: str, reduction: str) -> None:
    """By the backend that ``auto`` takes: no further from the truth than allowed, and than eager operations are."""
    z, target = (t.to(device) for t in draw(kind, *shape, dtype))
    weight = (torch.rand(shape[1], dtype=torch.float64) + 0.5).to(device, dtype)
    scale = 1024.0 if dtype == torch.float16 else 1.0  # as a loss scaler does: the mean's gradients would underflow
    if reduction != "none":
        upstream = torch.tensor(scale, dtype=torch.float64, device=device)
    else:
        upstream = scale * torch.randn(shape[0], dtype=torch.float64).to(dtype).double().to(device)
    for smoothing, w in itertools.product((0.0, 0.1), (None, weight)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        ours, our_grad = _gradient(FF.ticks_cross_entropy, z, target, upstream, weight=w, **options)
        _, eager_grad = _gradient(truth, z, target, upstream, weight=w, **options)
        wide = None if w is None else w.double()
        wide_target = target.double() if kind == "soft" else target
        exact, exact_grad = _gradient(truth, z.double(), wide_target, upstream, weight=wide, **options)
        assert ours.dtype == our_grad.dtype == dtype
        error, eager_error = relative_error(our_grad, exact_grad), relative_error(eager_grad, exact_grad)
        # Where eager operations are exact by luck: rounding the truth once, with fp16's subnormals, and a few in fp32.
        once = relative_error(exact_grad.to(dtype), exact_grad)
        floor = 2e-7 if dtype == torch.float32 else once
        assert error < max(LIMITS[dtype], 1.05 * once), (smoothing, w is None, error)
        if dtype != torch.float64:  # there the truth is that formula
            assert error <= FACTORS[dtype] * max(eager_error, floor), (smoothing, w is None, error, eager_error)
        torch.testing.assert_close(
            ours.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 * (dtype.itemsize < 8)
        )


def test_a_well_predicted_class_keeps_its_digits_whatever_kind_the_target_is() -> None:
    """1 - p is 3.4e-7 at (16, 0, 0, 0): pure ticks' gradient is its square, and all of it lies in q's digits."""
    z = torch.tensor([[16.0, 0.0, 0.0, 0.0]])
    onehot = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    exact = leaf(z.double())
    (expected,) = torch.autograd.grad(truth(exact, torch.tensor([0]), ce=0.0, ticks=1.0), exact)
    for target in (torch.tensor([0]), onehot):
        ours = leaf(z)
        (grad,) = torch.autograd.grad(FF.ticks_loss(ours, target), ours)
        torch.testing.assert_close(grad.double(), expected, rtol=2e-6, atol=0.0)


# ---------------------------------------------------------------------------------------------------------- edge cases


def test_masked_classes_without_mass_cost_nothing(place) -> None:
    z, target = (t.to(place.device) for t in draw("soft", 5, 8, torch.float32))
    z[:, 3], target[:, 3] = float("-inf"), 0.0
    ours = leaf(z)
    loss = FF.ticks_cross_entropy(ours, target, reduction="none", ticks_weight=0.5)
    few = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(loss, truth(z[:, few], target[:, few], reduction="none", ticks=0.5))
    (grad,) = torch.autograd.grad(loss.sum(), ours)
    assert grad.isfinite().all() and (grad[:, 3] == 0).all()


def test_a_masked_target_of_weight_0_costs_nothing(place) -> None:
    z, target = torch.randn(3, 5, device=place.device), torch.tensor([0, 2, 4], device=place.device)
    z[1, 2] = float("-inf")
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], device=place.device)
    ours = leaf(z)
    loss = FF.ticks_cross_entropy(ours, target, weight, reduction="none")
    assert loss[1] == 0 and loss.isfinite().all()
    (grad,) = torch.autograd.grad(loss.sum(), ours)
    assert (grad[1] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_ignored_rows_with_every_option(place, poison: float, label_smoothing: float) -> None:
    z, target = (t.to(place.device) for t in draw("hard", 9, 6, torch.float32))
    options = {"z_loss_weight": 0.1, "softcap": 5.0, "label_smoothing": label_smoothing, "ticks_weight": 0.5}
    keep = target != IGNORE
    z[~keep] = poison
    ours, others = leaf(z), leaf(z[keep])
    a = FF.ticks_cross_entropy(ours, target, **options)
    b = FF.ticks_cross_entropy(others, target[keep], **options)
    torch.testing.assert_close(a, b)
    (ga,), (gb,) = torch.autograd.grad(a, ours), torch.autograd.grad(b, others)
    torch.testing.assert_close(ga[keep], gb)
    assert (ga[~keep] == 0).all() and (~keep).sum() == 2


@kinds
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infinities_and_nan_make_their_row_nan_as_torch(place, kind: str, label_smoothing: float) -> None:
    z, target = (t.to(place.device) for t in draw(kind, 5, 9, torch.float32))
    if kind == "hard":
        target = torch.arange(5, device=place.device)
    z[1, 7], z[2, 2], z[3] = float("nan"), float("inf"), float("-inf")
    ours, theirs = leaf(z), leaf(z)
    a = FF.ticks_cross_entropy(ours, target, reduction="none", ticks_weight=0.0, label_smoothing=label_smoothing)
    b = F.cross_entropy(theirs, target, reduction="none", label_smoothing=label_smoothing)
    assert a.isnan().tolist() == b.isnan().tolist() == [False, True, True, True, False]
    a.sum().backward()
    assert ours.grad.isnan().any(1).tolist() == [False, True, True, True, False]


@kinds
def test_no_rows_and_no_classes(kind: str) -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        z, target = draw(kind, *shape) if shape[1] else (torch.zeros(shape), torch.zeros(shape))
        if kind == "hard" and not shape[1]:
            target = torch.full((shape[0],), IGNORE)
        for reduction in REDUCTIONS:
            ours = leaf(z)
            a = FF.ticks_cross_entropy(ours, target, reduction=reduction, ticks_weight=0.0, z_loss_weight=0.1)
            assert_same_bits(a.detach(), F.cross_entropy(z, target, reduction=reduction))
            a.sum().backward()
            assert ours.grad.shape == z.shape


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("target_dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@all_dtypes
def test_soft_targets_of_another_dtype(place, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    """The result is promoted as torch promotes it; each gradient has its own tensor's dtype."""
    z, target = (t.to(place.device) for t in draw("soft", 6, 50, torch.float64))
    z, target = z.to(dtype), target.to(target_dtype)
    ours, our_target = leaf(z), leaf(target)
    loss = FF.ticks_cross_entropy(ours, our_target, ticks_weight=0.0)
    assert loss.dtype == F.cross_entropy(z, target).dtype
    exact, exact_target = leaf(z.double()), leaf(target.double())
    expected = truth(exact, exact_target, ticks=0.0)
    unit = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=4 * unit, atol=4 * unit)
    grads = torch.autograd.grad(loss, (ours, our_target))
    for grad, t, e in zip(grads, (z, target), torch.autograd.grad(expected, (exact, exact_target)), strict=True):
        assert grad.dtype == t.dtype and relative_error(grad, e) < 4 * max(unit, torch.finfo(t.dtype).eps)


def test_autocast_returns_fp32_without_a_copy_of_the_logits(device: str) -> None:
    for kind, dtype in itertools.product(KINDS, LOW_PRECISION):
        z, target = (t.to(device) for t in draw(kind, 6, 50, dtype))
        weight = torch.rand(50, device=device)
        ours = leaf(z)
        with torch.autocast(device, torch.bfloat16):
            loss = FF.ticks_cross_entropy(ours, target, weight, label_smoothing=0.1, z_loss_weight=0.1)
            assert loss.dtype == torch.float32 == F.cross_entropy(z, target, weight).dtype
        wide = target.double() if kind == "soft" else target
        expected = truth(z.double(), wide, weight.double(), label_smoothing=0.1, z_loss_weight=0.1)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(loss, ours)[0].dtype == dtype


def test_class_weights_take_a_gradient_where_torchs_do() -> None:
    z, soft = draw("soft", 5, 7)
    _, hard = draw("hard", 5, 7)
    weight = leaf(torch.rand(7, dtype=torch.float64))
    for smoothing in (0.0, 0.3):
        ours = FF.ticks_cross_entropy(z, soft, weight, label_smoothing=smoothing, ticks_weight=0.0)
        theirs = F.cross_entropy(z, soft, weight, label_smoothing=smoothing)
        torch.testing.assert_close(torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight))
        assert torch.autograd.gradcheck(
            lambda w, s=smoothing: FF.ticks_cross_entropy(z, soft, w, label_smoothing=s), weight, check_forward_ad=True
        )
        assert type(exception_of(F.cross_entropy, z, hard, weight, label_smoothing=smoothing)) is RuntimeError
        with pytest.raises(RuntimeError, match="weight requires grad"):
            FF.ticks_cross_entropy(z, hard, weight, label_smoothing=smoothing)


@kinds
def test_vmap_over_class_weights(kind: str) -> None:
    z, target = draw(kind, 5, 7)
    weights = torch.rand(3, 7, dtype=torch.float64)

    def loss(z: Tensor, w: Tensor) -> Tensor:
        return FF.ticks_cross_entropy(z, target, w, label_smoothing=0.1, ticks_weight=0.5)

    wide = torch.stack([z.t(), 2 * z.t()]).movedim(0, -1).movedim(0, 1)  # (N, V, d)
    if kind == "soft":
        images = torch.stack([target, target], -1)
        together = torch.vmap(lambda w: FF.ticks_cross_entropy(wide, images, w, label_smoothing=0.1))(weights)
        rows, masses = wide.movedim(1, -1).reshape(-1, 7), images.movedim(1, -1).reshape(-1, 7)
        torch.testing.assert_close(
            together, torch.stack([truth(rows, masses, w, label_smoothing=0.1) for w in weights])
        )
    for function in (loss, torch.func.grad(loss)):
        together = torch.vmap(function, (None, 0))(z, weights)
        torch.testing.assert_close(together, torch.stack([function(z, w) for w in weights]))


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"label_smoothing": 1.5}, RuntimeError, r"1\.5"),
        ({"label_smoothing": -0.1}, RuntimeError, r"-0\.1"),
        ({"softcap": 0.0}, ValueError, r"0\.0"),
        ({"softcap": -3.0}, ValueError, r"-3"),
        ({"softcap": float("inf")}, ValueError, "inf"),
        ({"softcap": "2"}, TypeError, "softcap"),
        ({"ticks_weight": "0.1"}, TypeError, "ticks_weight"),
        ({"ticks_weight": None}, TypeError, "ticks_weight"),
        ({"ignore_index": float("nan")}, TypeError, "ignore_index"),
        ({"softcap": torch.tensor(3.0)}, TypeError, "softcap"),
        ({"z_loss_weight": torch.tensor(3.0)}, TypeError, "z_loss_weight"),
        ({"ticks_weight": torch.tensor(3.0)}, TypeError, "ticks_weight"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing"),
        ({"ignore_index": 1.5}, TypeError, r"1\.5"),
    ],
    ids=str,
)
def test_bad_options(options, error, says: str) -> None:
    z, target = draw("hard", 4, 5)
    with pytest.raises(error, match=says):
        FF.ticks_cross_entropy(z, target, **options)


def test_bad_soft_targets() -> None:
    z, soft = draw("soft", 4, 5)
    for args, kwargs in (
        ((z, soft), {"ignore_index": 2}),
        ((z, soft[:, :4]), {}),
        ((z, soft.long()), {}),
        ((z, soft), {"weight": torch.ones(4, dtype=torch.float64)}),
    ):
        theirs = exception_of(F.cross_entropy, *args, **kwargs)
        with pytest.raises(type(theirs)):
            FF.ticks_cross_entropy(*args, **kwargs)


# -------------------------------------------------------------------------------------------------------------- memory


def test_gradient_in_the_logits_place(place) -> None:
    for kind, strided in itertools.product(KINDS, (False, True)):
        z, target = (t.to(place.device) for t in draw(kind, 8, 50, torch.float32))
        expected = torch.autograd.grad(FF.ticks_cross_entropy(x := leaf(z), target), x)[0]
        leaf_of_it = z.detach().requires_grad_()
        logits = torch.cat([leaf_of_it + 0] * 2, 1)[:, :50] if strided else leaf_of_it + 0
        version = logits._version
        loss = FF.ticks_cross_entropy(logits, target, inplace_backward=True)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert grad.data_ptr() == logits.data_ptr() and logits._version > version
        torch.testing.assert_close(grad, expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf_of_it)


def test_gradient_in_place_spares_what_others_need(place) -> None:
    z, target = (t.to(place.device) for t in draw("hard", 8, 50, torch.float32))
    x = leaf(z)
    logits = x.exp()  # saves its output
    loss = FF.ticks_cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(FF.ticks_cross_entropy(x * 2, target, inplace_backward=True), x, create_graph=True)
    one = leaf(z[:1])
    row = one + 0
    logits = row.expand(8, 50)  # eight rows in one place: no place for eight gradients
    FF.ticks_cross_entropy(logits, target, inplace_backward=True).backward()
    torch.testing.assert_close(row.detach(), z[:1])
    expected = leaf(z[:1])
    FF.ticks_cross_entropy(expected.expand(8, 50), target).backward()
    torch.testing.assert_close(one.grad, expected.grad)


@pytest.mark.parametrize("view", [False, True])
def test_a_leaf_is_no_place_for_its_gradient(view: bool) -> None:
    z, target = draw("hard", 4, 6)
    parameter = nn.Parameter(z)
    logits = parameter.view(4, 6) if view else parameter
    with pytest.raises(RuntimeError, match=r"\(4, 6\).*leaf"):
        FF.ticks_cross_entropy(logits, target, inplace_backward=True)
    with torch.no_grad():
        FF.ticks_cross_entropy(logits, target, inplace_backward=True)


def test_gradient_in_the_place_of_a_copy_marks_no_logits_as_modified() -> None:
    z, target = draw("hard", 6, 6)
    x = leaf(z)
    logits = (x * 1).t()  # whose rows are copied for the kernels
    (logits.square().sum() + FF.ticks_cross_entropy(logits, target, inplace_backward=True)).backward()
    y = leaf(z)
    (y.square().sum() + truth(y.t(), target)).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_transforms_take_no_notice_of_inplace_backward() -> None:
    z, target = draw("hard", 4, 6)
    grads = [
        torch.func.grad(lambda z, inplace=inplace: FF.ticks_cross_entropy(z, target, inplace_backward=inplace))(z)
        for inplace in (False, True)
    ]
    assert_same_bits(*grads)


def test_row_strided_logits_are_not_copied(place, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fused_norm.dispatch.select("ticks", place.device) or fused_norm.reference
    seen = []
    for name in ("ticks_forward", "ticks_backward"):
        function = getattr(module, name)
        position = 0 if name == "ticks_forward" else 2

        def spy(*args, function=function, position=position):
            seen.append(args[position].data_ptr())
            return function(*args)

        monkeypatch.setattr(module, name, spy)
    for kind in KINDS:
        _, target = draw(kind, 6, 40, torch.float32)
        wide = torch.randn(6, 64, device=place.device)
        view = wide[:, 3:43].requires_grad_()
        FF.ticks_cross_entropy(view, target.to(place.device)).backward()
        assert seen == [view.data_ptr()] * 2
        seen.clear()


# ------------------------------------------------------------------------------------------------------------- modules


def test_modules_stand_where_cross_entropy_loss_stood() -> None:
    weight = torch.rand(7)
    theirs = nn.CrossEntropyLoss(weight, None, 3, None, "sum", 0.1)
    z, target = torch.randn(5, 7), torch.tensor([0, 1, 3, 5, 6])
    for cls in (fused_norm.TicksLoss, fused_norm.TicksCrossEntropyLoss):
        ours = cls(weight, None, 3, None, "sum", 0.1)
        assert isinstance(ours, nn.CrossEntropyLoss) and list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        function = FF.ticks_loss if cls is fused_norm.TicksLoss else FF.ticks_cross_entropy
        torch.testing.assert_close(ours(z, target), function(z, target, weight, 3, "sum", 0.1))
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert_same_bits(copied(z, target), ours(z, target))
    exact = fused_norm.TicksCrossEntropyLoss(weight, None, 3, None, "sum", 0.1, ticks_weight=0.0)
    torch.testing.assert_close(exact(z, target), theirs(z, target))
    options = {"ticks_weight": 0.5, "z_loss_weight": 0.1, "softcap": 5.0}
    ours = fused_norm.TicksCrossEntropyLoss(**options)
    torch.testing.assert_close(ours(z, target), FF.ticks_cross_entropy(z, target, **options))
    assert repr(ours) == "TicksCrossEntropyLoss(ticks_weight=0.5)"
    logits = z.clone().requires_grad_() + 0
    loss = fused_norm.TicksCrossEntropyLoss(inplace_backward=True)(logits, target)
    assert torch.autograd.grad(loss, logits)[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("causal", [False, True])
def test_trainer_loss(causal: bool) -> None:
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    labels[0, 3:] = -100
    rows, targets = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
    total = truth(rows.reshape(-1, 7), targets.reshape(-1), reduction="sum", ticks=0.25)
    count = (targets != -100).sum()
    loss = fused_norm.TrainerLoss(causal, ticks_weight=0.25)
    for outputs in ({"logits": logits}, (logits, "more")):
        torch.testing.assert_close(loss(outputs, labels), total / count)
        for items in (torch.tensor(37), 37):
            torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=items), total / 37)
    (ours,) = torch.autograd.grad(loss({"logits": logits}, labels), logits)
    (theirs,) = torch.autograd.grad(total / count, logits)
    torch.testing.assert_close(ours, theirs)


def test_trainer_loss_does_not_overflow_fp16_and_refuses_unknown_options() -> None:
    logits, labels = torch.randn(8192, 32).half() * 20, torch.randint(32, (8192,))
    loss = fused_norm.TrainerLoss(ticks_weight=0.0)({"logits": logits}, labels, 8192)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels))
    for option in ("tick_weight", "reduction"):
        with pytest.raises(TypeError, match=option):
            fused_norm.TrainerLoss(**{option: 0.1})


def test_trainer_loss_is_transformers_own_at_ticks_weight_0() -> None:
    module = pytest.importorskip("transformers.loss.loss_utils", reason="transformers is not installed")
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[1, :2] = -100
    for items in (None, torch.tensor(13)):
        ours = fused_norm.TrainerLoss(causal=True, ticks_weight=0.0)({"logits": logits}, labels, items)
        theirs = module.ForCausalLMLoss(logits, labels, vocab_size=7, num_items_in_batch=items)
        torch.testing.assert_close(ours, theirs)


def test_trainer_trains_with_it(tmp_path) -> None:
    """Two steps of gradient accumulation give the weights of one step with both batches at once."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    tokens = torch.randint(11, (4, 8))
    labels = tokens.clone()
    labels[0, 2:] = -100  # batches of different sizes: a mean of means would differ
    data = [{"input_ids": t, "labels": lab} for t, lab in zip(tokens, labels, strict=True)]
    results = []
    for batch, accumulation in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=1, learning_rate=0.1, optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=True, seed=0, max_grad_norm=0.0, warmup_steps=0, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            compute_loss_func=fused_norm.TrainerLoss(causal=True, ticks_weight=0.5),
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train()
        results.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    assert results[0]["transformer.wte.weight"].abs().max() > 0
    for name, step in results[0].items():
        torch.testing.assert_close(step, results[1][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------------------- compile


@kinds
def test_compiled_code_gives_eagers_bits(kind: str) -> None:
    torch._dynamo.reset()
    weight = torch.rand(50)

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return FF.ticks_cross_entropy(
            z * 2, target, weight, label_smoothing=0.1, z_loss_weight=0.1, softcap=9.0, ticks_weight=0.5
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        z, target = draw(kind, rows, 50, torch.float32)
        results = []
        for function in (loss, compiled):
            ours = leaf(z)
            out = function(ours, target)
            results.append((out.detach(), torch.autograd.grad(out, ours)[0]))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)


def test_compiled_code_raises_for_a_target_out_of_range() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, t: FF.ticks_cross_entropy(z, t), fullgraph=True, backend="aot_eager")
    z, target = draw("hard", 4, 5)
    target[2] = 7
    with fused_norm.use_backend("native" if fused_norm.available_backends()["native"] is None else "auto"):
        expected = IndexError if fused_norm.available_backends()["native"] is None else RuntimeError
        with pytest.raises(expected, match="7"):
            compiled(z, target)


def test_operators_pass_opcheck(place) -> None:
    if place.backend not in ("native", "triton"):
        pytest.skip("it has no operators")
    prefix = "" if place.backend == "native" else "triton_"
    ops = SimpleNamespace(
        forward=getattr(torch.ops.fused_norm, prefix + "ticks_forward").default,
        backward=getattr(torch.ops.fused_norm, prefix + "ticks_backward").default,
    )
    for kind, smoothing in itertools.product(KINDS, (0.0, 0.1)):
        z, target = (t.to(place.device) for t in draw(kind, 5, 9, torch.float32))
        weight, options = torch.rand(9, device=place.device), (IGNORE, smoothing, 1.0, 0.5, 3.0)
        torch.library.opcheck(ops.forward, (z, target, weight, *options))
        loss, stats = ops.forward(z, target, weight, *options)
        args = (
            torch.randn_like(loss),
            torch.randn_like(loss),
            z,
            target,
            stats,
            weight,
            *options,
            True,
            kind == "soft",
        )
        torch.library.opcheck(ops.backward, args)


def test_export_holds_torchs_operators_alone() -> None:
    class Loss(nn.Module):
        def forward(self, z: Tensor, target: Tensor) -> Tensor:
            return FF.ticks_cross_entropy(z, target, label_smoothing=0.1, z_loss_weight=0.1)

    z, target = draw("hard", 6, 9, torch.float32)
    program = torch.export.export(Loss(), (z, target))
    assert "fused_norm" not in str(program.graph)
    torch.testing.assert_close(program.module()(z, target), Loss()(z, target))


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_data(device: str) -> None:
    z, target = draw("hard", 6, 9, torch.bfloat16)
    if device == "meta":
        ours = z.to("meta").requires_grad_()
        loss = FF.ticks_cross_entropy(ours, target.to("meta"))
    else:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
            ours = mode.from_tensor(z).requires_grad_()
            loss = FF.ticks_cross_entropy(ours * 1, mode.from_tensor(target), inplace_backward=True)
    assert loss.shape == () and loss.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(loss, ours)
    assert grad.shape == z.shape and grad.dtype == z.dtype


def test_tensor_subclasses_keep_their_own_ways() -> None:
    class Logged(Tensor):
        calls: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    z, target = draw("hard", 6, 9)
    loss = FF.ticks_cross_entropy(z.as_subclass(Logged), target, ticks_weight=0.5)
    assert Logged.calls[0] is FF.ticks_cross_entropy
    torch.testing.assert_close(loss.as_subclass(Tensor), truth(z, target, ticks=0.5))


# ----------------------------------------------------------------------------------------------------------------- GPU


def _gpu_step(kind: str, linear: bool):
    z, target = (t.cuda() for t in draw(kind, 64, 1000, torch.float32))
    weight = torch.rand(1000, device="cuda")
    w = torch.randn(1000, 32, device="cuda", requires_grad=True)
    x = torch.randn(64, 32, device="cuda", requires_grad=True)
    z.requires_grad_()
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.1, "softcap": 9.0}

    def step() -> tuple[Tensor, ...]:
        if linear:
            loss = FF.linear_ticks_cross_entropy(x, w, target, None, weight, chunk_bytes=1000 * 4 * 20, **options)
            return loss, *torch.autograd.grad(loss, (x, w))
        loss = FF.ticks_cross_entropy(z, target, weight, **options)
        return loss, *torch.autograd.grad(loss, z)

    return step


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("linear", [False, True])
def test_no_synchronisation(kind: str, linear: bool) -> None:
    step = _gpu_step(kind, linear)
    expected = step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(results, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("linear", [False, True])
def test_cuda_graph(kind: str, linear: bool) -> None:
    step = _gpu_step(kind, linear)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for r in results:
        r.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
