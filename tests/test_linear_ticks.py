"""FF.linear_ticks_cross_entropy and FF.linear_ticks_loss against the materialised logits in fp64, and their memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
import torch.nn.functional as F
from cases import DTYPES, LOW_PRECISION, assert_same_bits, leaf
from test_ticks_options import IGNORE, KINDS, REDUCTIONS, truth
from torch import Tensor

import fused_norm
import fused_norm.functional as FF
from fused_norm import linear_ticks
from fused_norm.testing import relative_error

M, H, V = 9, 5, 11
CHUNK = 4 * V * 8  # four fp64 rows at most: chunks of three

kinds = pytest.mark.parametrize("kind", KINDS)


def draw(kind: str, m: int = M, h: int = H, v: int = V, dtype: torch.dtype = torch.float64, device: str = "cpu"):
    """(x, w, bias, target)"""
    x, w, b = (torch.randn(*shape, dtype=torch.float64).to(device, dtype) for shape in ((m, h), (v, h), (v,)))
    if kind == "soft":
        return x, w, b, torch.softmax(torch.randn(m, v, dtype=torch.float64), 1).to(device, dtype)
    target = torch.randint(v, (m,))
    target[1::4] = IGNORE
    return x, w, b, target.to(device)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() else leaf(t) for t in tensors]


def differentiable(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None and t.requires_grad]


def by_definition(x, w, b, target, **options) -> Tensor:
    return truth(F.linear(x, w, b), target, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@kinds
def test_options_in_every_combination(place, kind: str, reduction: str) -> None:
    """Values and gradients of all that may have one, twice through the same graph."""
    inputs = draw(kind, device=place.device)
    class_weights = torch.rand(V, dtype=torch.float64, device=place.device)
    for smoothing, weight, z_loss, softcap, bias, chunk in itertools.product(
        (0.0, 0.2), (None, class_weights), (0.0, 0.3), (None, 2.0), (True, False), (None, CHUNK)
    ):
        x, w, b, target = ours = leaves(*inputs[:2], inputs[2] if bias else None, inputs[3])
        theirs = leaves(*inputs[:2], inputs[2] if bias else None, inputs[3])
        options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss_weight": z_loss, "softcap": softcap}
        a = FF.linear_ticks_cross_entropy(x, w, target, b, weight, ticks_weight=0.4, chunk_bytes=chunk, **options)
        e = by_definition(*theirs, weight=weight, ticks=0.4, **options)
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
        upstream = torch.randn(e.shape, dtype=torch.float64, device=place.device)
        expected = torch.autograd.grad(e, differentiable(theirs), upstream)
        for _ in range(2):
            grads = torch.autograd.grad(a, differentiable(ours), upstream, retain_graph=True)
            for grad, exact in zip(grads, expected, strict=True):
                assert grad.dtype == exact.dtype and relative_error(grad, exact) < 1e-10, (options, bias, chunk)


@kinds
def test_ticks_alone(kind: str) -> None:
    inputs = draw(kind)
    x, w, b, target = ours = leaves(*inputs)
    theirs = leaves(*inputs)
    a = FF.linear_ticks_loss(x, w, target, b, label_smoothing=0.1, chunk_bytes=CHUNK)
    e = by_definition(*theirs, label_smoothing=0.1, ce=0.0, ticks=1.0)
    torch.testing.assert_close(a, e)
    for grad, exact in zip(
        *(torch.autograd.grad(t, differentiable(i)) for t, i in ((a, ours), (e, theirs))), strict=True
    ):
        assert relative_error(grad, exact) < 1e-10


@pytest.mark.parametrize("need", list(itertools.product((False, True), repeat=3))[1:], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_needed_subsets(need, reduction: str) -> None:
    """What needs no gradient gets none, and does not change the others'."""
    x, w, b, target = draw("hard")
    tensors = [t.requires_grad_(n) for t, n in zip((x, w, b), need, strict=True)]
    loss = FF.linear_ticks_cross_entropy(x, w, target, b, reduction=reduction, chunk_bytes=CHUNK).sum()
    wanted = [t for t in tensors if t.requires_grad]
    expected = torch.autograd.grad(by_definition(x, w, b, target, reduction=reduction).sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@kinds
def test_derivatives(kind: str, reduction: str) -> None:
    x, w, b, target = draw(kind, 4, 3, 5)
    given = [x, w, b] if kind == "hard" else [x, w, b, target]

    def loss(*tensors: Tensor) -> Tensor:
        return FF.linear_ticks_cross_entropy(
            *(tensors[0], tensors[1], target if kind == "hard" else tensors[3], tensors[2]),
            reduction=reduction,
            ticks_weight=0.4,
            z_loss_weight=0.1,
            chunk_bytes=2 * 5 * 8,
        )

    tensors = [leaf(t) for t in given]
    options = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(loss, tensors, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert torch.autograd.gradgradcheck(loss, tensors, check_fwd_over_rev=True, **options)


def test_transforms() -> None:
    x, w, b, target = draw("hard")

    def ours(x: Tensor) -> Tensor:
        return FF.linear_ticks_cross_entropy(x, w, target, b, ticks_weight=0.4, chunk_bytes=CHUNK)

    def theirs(x: Tensor) -> Tensor:
        return by_definition(x, w, b, target, ticks=0.4)

    pair = torch.stack([x, 2 * x])
    for transform in (
        torch.func.grad,
        torch.func.hessian,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x.sin(),)),
        lambda f: lambda x: torch.vmap(torch.func.grad(f))(pair),
    ):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@kinds
@torch._functorch.config.patch(donated_buffer=False)  # else there is no second backward
def test_compiled_code_gives_eagers_bits(kind: str, reduction: str) -> None:
    torch._dynamo.reset()

    def loss(x, w, b, target) -> Tensor:
        options = {"reduction": reduction, "z_loss_weight": 0.1, "chunk_bytes": 2 * V * 4}
        return FF.linear_ticks_cross_entropy(x * 2, w, target, b, ticks_weight=0.5, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        inputs = draw(kind, rows, dtype=torch.float32)
        upstream = torch.randn(() if reduction == "mean" else rows)
        results = []
        for function in (loss, compiled):
            given = leaves(*inputs)
            out = function(*given)
            first = torch.autograd.grad(out, differentiable(given), upstream, retain_graph=True)
            second = torch.autograd.grad(out, differentiable(given), upstream)
            for a, b in zip(first, second, strict=True):
                torch.testing.assert_close(a, b)
            results.append((out.detach(), *first))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)


@kinds
def test_one_graph_serves_any_number_of_rows(kind: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    _, w, b, _ = draw(kind)
    compiled = torch.compile(
        lambda x, t: FF.linear_ticks_cross_entropy(x, w, t, b), fullgraph=True, dynamic=True, backend=counter
    )
    graphs = []
    for rows in (6, 7, 8, 9):  # as many rows as features would be another graph
        x, _, _, target = draw(kind, rows)
        torch.testing.assert_close(compiled(x, target), by_definition(x, w, b, target))
        graphs.append(counter.frame_count)  # the first is traced twice, to take the floats for constants
    assert len(set(graphs)) == 1


def test_no_features() -> None:
    x, w, target = torch.randn(3, 0), torch.randn(5, 0), torch.tensor([0, 1, 2])
    loss = FF.linear_ticks_cross_entropy(x, w, target, ticks_weight=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w), target))


def test_opcheck() -> None:
    x, w, b, target = leaves(*draw("hard", dtype=torch.float32))
    one = torch.ones(())
    options = (IGNORE, 0.1, 1.0, 0.5, 3.0, "mean", 0.1, 2 * V * 4, False, [True, True, True, False], "reference")
    tensors = (x.detach(), w.detach(), b.detach(), target, None, one, one)
    torch.library.opcheck(torch.ops.fused_norm.linear_ticks_forward.default, (*tensors, *options))
    torch.library.opcheck(torch.ops.fused_norm.linear_ticks_backward.default, (one, *tensors, *options))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_accuracy(device: str, dtype: torch.dtype) -> None:
    """Against the truth, and against F.linear with F.cross_entropy in the same dtype."""
    inputs = draw("hard", 40, 32, 1000, dtype, device)
    upstream = 512.0
    grads = []
    for function, wide in (
        (lambda x, w, b, t: FF.linear_ticks_cross_entropy(x, w, t, b, ticks_weight=0.0, chunk_bytes=1000 * 100), False),
        (lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t), False),
        (lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t), True),
    ):
        given = leaves(*(t.double() if wide and t.is_floating_point() else t for t in inputs))
        loss = function(*given)
        assert loss.dtype == given[0].dtype
        grads.append(torch.autograd.grad(loss, given[:3], torch.tensor(upstream, dtype=loss.dtype, device=device)))
    unit = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for ours, theirs, exact in zip(*grads, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, exact) <= max(1.05 * relative_error(theirs, exact), unit)


@pytest.mark.parametrize("derivative", [torch.autograd.grad, torch.func.grad], ids=["autograd", "func"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=lambda d: str(d).removeprefix("torch."))
@kinds
def test_class_weights_and_soft_targets_in_low_precision(kind: str, dtype: torch.dtype, derivative) -> None:
    """They stand beside logits of bf16 and fp16, or of fp32 where the products are taken in it."""
    x, w, b, target = draw(kind, dtype=dtype)
    weight = (torch.rand(V) + 0.5).to(dtype)

    def loss(x: Tensor, *, ours: bool) -> Tensor:
        if ours:
            return FF.linear_ticks_cross_entropy(x, w, target, b, weight, label_smoothing=0.1, chunk_bytes=CHUNK)
        wide = target.double() if kind == "soft" else target
        return by_definition(x, w.double(), b.double(), wide, weight=weight.double(), label_smoothing=0.1)

    def gradient(x: Tensor, ours: bool) -> Tensor:
        if derivative is torch.func.grad:
            return torch.func.grad(lambda x: loss(x, ours=ours))(x)
        x = leaf(x)
        return torch.autograd.grad(loss(x, ours=ours), x)[0]

    assert relative_error(gradient(x, True), gradient(x.double(), False)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=lambda d: str(d).removeprefix("torch."))
def test_fp32_accumulation_over_many_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bf16 or fp16, as on a GPU: a sum rounded once, instead of once a chunk."""
    monkeypatch.setattr(linear_ticks, "_products_in_low_precision", lambda dtype: True)
    x, w, b, target = draw("hard", 64, 8, 16, dtype)
    exact = leaves(*(t.double() if t.is_floating_point() else t for t in (x, w, b, target)))
    expected = torch.autograd.grad(by_definition(*exact, reduction="sum"), exact[1])[0]
    errors = []
    for accumulate_fp32 in (False, True):
        given = leaves(x, w, b, target)
        loss = FF.linear_ticks_cross_entropy(
            given[0], given[1], target, given[2], reduction="sum", chunk_bytes=1, accumulate_fp32=accumulate_fp32
        )
        grad = torch.autograd.grad(loss, given[1])[0]
        assert grad.dtype == dtype
        errors.append(relative_error(grad, expected))
    assert errors[1] < 0.8 * errors[0]


def test_fp16_gradients_do_not_vanish_before_a_loss_scalers_factor() -> None:
    x, w, b, target = leaves(*draw("hard", 64, 8, 16, torch.float16))
    with torch.no_grad():
        x.mul_(1e-4)
    loss = FF.linear_ticks_cross_entropy(x, w, target, b)
    scaled = torch.autograd.grad(loss.float() * 2.0**15, w)[0].double() / 2**15
    exact = leaves(*(t.double() if t.is_floating_point() else t for t in (x, w, b, target)))
    assert relative_error(scaled, torch.autograd.grad(by_definition(*exact), exact[1])[0]) < 2e-3


def test_autocast(device: str) -> None:
    """Hidden states, weight and bias are cast to autocast's dtype, the loss is fp32, gradients have their own dtype."""
    inputs = leaves(*draw("hard", 20, 16, 50, torch.float32, device))
    with torch.autocast(device, torch.bfloat16):
        loss = FF.linear_ticks_cross_entropy(inputs[0], inputs[1], inputs[3], inputs[2], ticks_weight=0.0)
        cast = [t.bfloat16() for t in inputs[:3]]
    assert loss.dtype == torch.float32
    expected = by_definition(*(t.double() for t in cast), inputs[3], ticks=0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-2, atol=1e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, inputs[:3]))


@pytest.mark.parametrize("create_graph", [False, True])
def test_nan_in_an_ignored_row_reaches_no_gradient(create_graph: bool) -> None:
    x, w, b, target = leaves(*draw("hard"))
    with torch.no_grad():
        x[target == IGNORE] = float("nan")
    for reduction in ("mean", "none"):
        loss = FF.linear_ticks_cross_entropy(x, w, target, b, reduction=reduction, chunk_bytes=CHUNK).sum()
        dx, dw, db = torch.autograd.grad(loss, (x, w, b), create_graph=create_graph)
        assert dw.isfinite().all() and db.isfinite().all() and (dx[target == IGNORE] == 0).all() and dx.isfinite().all()


@pytest.mark.parametrize("reduction, value", [("mean", float("nan")), ("sum", 0.0), ("none", 0.0)])
def test_all_rows_ignored(reduction: str, value: float) -> None:
    x, w, b, _ = leaves(*draw("hard"))
    loss = FF.linear_ticks_cross_entropy(x, w, torch.full((M,), IGNORE), b, reduction=reduction, z_loss_weight=0.1)
    assert_same_bits(loss.detach(), torch.full_like(loss, value))
    for grad in torch.autograd.grad(loss.sum(), (x, w, b)):
        assert (grad == 0).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_shapes(shape) -> None:
    for kind, reduction in itertools.product(KINDS, REDUCTIONS):
        x, w, b, target = draw(kind, max(1, torch.Size(shape).numel()))
        if torch.Size(shape).numel() == 0:
            x, target = x[:0], target[:0]
        x, target = x.reshape(*shape, H), target.reshape(*shape, V) if kind == "soft" else target.reshape(shape)
        given = leaves(x, w, b)
        loss = FF.linear_ticks_cross_entropy(given[0], given[1], target, given[2], reduction=reduction)
        rows = target.reshape(-1, V) if kind == "soft" else target.reshape(-1)
        expected = by_definition(x.reshape(-1, H), w, b, rows, reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        torch.testing.assert_close(loss.reshape(expected.shape), expected, equal_nan=True)
        for grad, t in zip(torch.autograd.grad(loss.sum(), given), given, strict=True):
            assert grad.shape == t.shape


@pytest.mark.parametrize("layout", ["transposed weight", "strided rows", "expanded"])
def test_layouts(layout: str) -> None:
    x, w, b, target = draw("hard")
    if layout == "transposed weight":
        w = w.t().contiguous().t()
    elif layout == "strided rows":
        x = torch.cat([x, x], 1)[:, :H]
    else:
        x = x[:1].expand(M, H)
    given = [t.detach().requires_grad_() for t in (x, w, b)]
    grads = torch.autograd.grad(
        FF.linear_ticks_cross_entropy(given[0], given[1], target, given[2], chunk_bytes=CHUNK), given
    )
    exact = leaves(x, w, b)
    torch.testing.assert_close(grads, torch.autograd.grad(by_definition(*exact, target), exact))


BAD = {
    "weight of one dimension": (lambda x, w, b, t: (x, w[0], t, b), RuntimeError, r"\(5,\)"),
    "features differ": (lambda x, w, b, t: (x[:, :4], w, t, b), RuntimeError, r"\(9, 4\).*\(11, 5\)"),
    "bias of another size": (lambda x, w, b, t: (x, w, t, b[:3]), RuntimeError, r"\(3,\).*11"),
    "fewer targets": (lambda x, w, b, t: (x, w, t[:3], b), ValueError, r"\(3,\).*\(9, 5\)"),
    "another dtype": (lambda x, w, b, t: (x.float(), w, t, b), RuntimeError, "float64.*float32"),
    "another device": (lambda x, w, b, t: (x, w.to("meta"), t, b), RuntimeError, "meta.*cpu"),
    "a list": (lambda x, w, b, t: ([1.0], w, t, b), TypeError, "list"),
    "an int dtype": (lambda x, w, b, t: (x, w.long(), t, b), RuntimeError, "int64.*float64"),
    "int probabilities": (lambda x, w, b, t: (x, w, torch.ones(9, 11).long(), b), RuntimeError, r"int64.*\(9, 11\)"),
    "an int": (lambda x, w, b, t: (x, w, 3, b), TypeError, "int"),
    "int32 targets": (lambda x, w, b, t: (x, w, t.int(), b), RuntimeError, "int32"),
    "out of range": (lambda x, w, b, t: (x, w, torch.full_like(t, V), b), IndexError, "11"),
}


@pytest.mark.parametrize("bad, error, says", BAD.values(), ids=BAD)
def test_bad_arguments(bad, error, says: str) -> None:
    with pytest.raises(error, match=says):
        FF.linear_ticks_cross_entropy(*bad(*draw("hard")))


@pytest.mark.parametrize("chunk_bytes", [0, -1, 1.5, True])
def test_bad_chunk_bytes(chunk_bytes) -> None:
    x, w, b, target = draw("hard")
    with pytest.raises(ValueError, match="chunk_bytes"):
        FF.linear_ticks_cross_entropy(x, w, target, b, chunk_bytes=chunk_bytes)


def test_chunks_fit_their_budget() -> None:
    assert linear_ticks.chunk_rows(512, 128256, 4, 64 << 20) * 128256 * 4 <= 64 << 20
    assert linear_ticks.chunk_rows(100, 1000, 4, 1) == 1
    assert linear_ticks.chunk_rows(100, 1000, 4, 1 << 40) == 100
    assert linear_ticks.chunk_rows(9, 1000, 4, 4 * 4000) == 3  # 3 + 3 + 3, not 4 + 4 + 1


def _peak(function) -> int:
    """The most memory held at once beyond what there was, by torch's own record of the CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    del kept
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_record_of_memory_is_right() -> None:
    def two_then_one() -> Tensor:
        a, b = torch.ones(1000, 100), torch.ones(1000, 100)
        del a
        return b

    assert 800_000 <= _peak(two_then_one) < 900_000


def test_the_logits_are_never_in_memory() -> None:
    """Peak beyond the returned gradients: a chunk and rows; the eager path holds several arrays of logits."""
    x, w, _, target = leaves(*draw("hard", 512, 16, 20000, torch.float32))
    chunk = 4 << 20

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(FF.linear_ticks_cross_entropy(x, w, target, chunk_bytes=chunk), (x, w))

    def eager() -> tuple[Tensor, ...]:
        log_p = torch.log_softmax(F.linear(x, w), -1).gather(1, target.clamp_min(0)[:, None])
        return torch.autograd.grad((-log_p + 0.001 * (log_p.exp() - log_p)).mean(), (x, w))

    returned = 4 * (x.numel() + w.numel())
    peak = _peak(ours) - returned
    assert peak <= chunk + (64 << 10), peak
    assert peak <= 0.15 * (_peak(eager) - returned)


def test_module() -> None:
    loss = fused_norm.LinearTicksCrossEntropyLoss(H, V, bias=True, dtype=torch.float64, ticks_weight=0.3, softcap=4.0)
    assert list(loss.state_dict()) == ["linear.weight", "linear.bias"]
    x, _, _, target = draw("hard")
    expected = by_definition(x, loss.linear.weight, loss.linear.bias, target, ticks=0.3, softcap=4.0)
    torch.testing.assert_close(loss(x, target), expected)
    assert "ticks_weight=0.3" in repr(loss)
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if theirs is not None:  # torch 2.13
        other = theirs(H, V, bias=True, dtype=torch.float64)
        other.load_state_dict(loss.state_dict())
        ours = fused_norm.LinearTicksCrossEntropyLoss(H, V, bias=True, dtype=torch.float64, ticks_weight=0.0)
        ours.load_state_dict(other.state_dict())
        torch.testing.assert_close(ours(x, target), other(x, target))


def test_training_with_it_learns() -> None:
    x, target = torch.randn(64, 10), torch.randint(4, (64,))
    loss = fused_norm.LinearTicksCrossEntropyLoss(10, 4)
    optimizer = torch.optim.SGD(loss.parameters(), 0.5)
    history = []
    for _ in range(10):
        optimizer.zero_grad()
        out = loss(x, target)
        out.backward()
        optimizer.step()
        history.append(out.item())
    assert all(b < a for a, b in itertools.pairwise(history))
