"""The ticks loss's C++ CPU kernels, called directly, under each instruction set that this machine has."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from test_native_cpu import capability, dtype_id, laid_out, same_bits  # noqa: F401
from torch import Tensor

from fused_norm import reference
from fused_norm.backends import native
from fused_norm.testing import error_limit, relative_error, typical_rounding

pytestmark = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason=f"no native CPU backend: {native.unavailable('cpu')}"
)

F64, F32, BF16, F16 = DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
IGNORE = -100
INF, NAN = float("inf"), float("nan")
BOOLEANS = (False, True)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

#: The relative L2 error of a gradient that nothing may exceed.
MOST = {F64: 1e-10, F32: 5e-6, BF16: 1e-2, F16: 2e-3}


@dataclass(frozen=True)
class Call:
    """The contract's arguments."""

    z: Tensor
    target: Tensor
    weight: Tensor | None = None
    ignore_index: int = IGNORE
    smoothing: float = 0.0
    ce: float = 0.9
    ticks: float = 0.7
    softcap: float = 0.0
    grad: Tensor | None = None
    grad_lse: Tensor | None = None

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def acc(self) -> torch.dtype:
        return reference.accumulation_dtype(self.z)

    @property
    def options(self) -> tuple[int, float, float, float, float]:
        return self.ignore_index, self.smoothing, self.ce, self.ticks, self.softcap

    def to(self, dtype: torch.dtype) -> Call:
        moved = {k: t.to(dtype) for k, t in vars(self).items() if isinstance(t, Tensor) and t.is_floating_point()}
        return replace(self, **moved)

    def run(self, backend=native, needs: tuple[bool, bool] | None = None, inplace: bool = False) -> dict[str, Tensor]:
        loss, stats = backend.ticks_forward(self.z, self.target, self.weight, *self.options)
        grad = torch.ones_like(loss) if self.grad is None else self.grad
        z = self.z.clone() if inplace == "copy" else self.z
        dz, dtarget = backend.ticks_backward(
            grad,
            self.grad_lse,
            z,
            self.target,
            stats,
            self.weight,
            *self.options,
            *(needs or (True, self.soft)),
            bool(inplace),
        )
        results = {"loss": loss, "stats": stats, "dz": dz, "dtarget": dtarget}
        return {k: t for k, t in results.items() if k != "dtarget" or self.soft}


def draw(
    rows: int,
    classes: int,
    dtype: torch.dtype = F32,
    soft: bool = False,
    weight: bool = False,
    lse: bool = False,
    beside: torch.dtype | None = None,
    **options,
) -> Call:
    """Random numbers; in some rows the target's logit stands out, one row is ignored, one class weighs nothing.

    ``beside`` is the dtype of weight and soft targets.
    """
    z = 3 * torch.randn(rows, classes, dtype=F64)
    acc = F64 if dtype == F64 else F32
    if soft:
        target = torch.softmax(2 * torch.randn(rows, classes, dtype=F64), 1).to(beside or dtype)
    else:
        target = torch.randint(classes, (rows,))
        z[: rows // 3].scatter_add_(1, target[: rows // 3, None], torch.full((rows // 3, 1), 12.0, dtype=F64))
        if rows > 2:
            target[rows // 2] = IGNORE
    if weight:
        options["weight"] = (0.2 + torch.rand(classes, dtype=F64)).to(beside or dtype)
        if classes > 2:
            options["weight"][classes // 2] = 0
    # Upstream gradients that the eager formula can take in its own dtype.
    grads = [torch.randn(rows, dtype=F64).to(dtype).to(acc) for _ in range(2)]
    return Call(z.to(dtype), target, grad=grads[0], grad_lse=grads[1] if lse else None, **options)


def eager(call: Call) -> tuple[Tensor, ...]:
    """dz, and dtarget of soft targets, of the formula as one writes it in the logits' dtype, by autograd."""
    c = call.to(call.z.dtype)
    inputs = [c.z.detach().requires_grad_()] + ([c.target.detach().requires_grad_()] if c.soft else [])
    z = c.softcap * torch.tanh(inputs[0] / c.softcap) if c.softcap else inputs[0]
    log_p, keep = (
        torch.log_softmax(z, 1),
        torch.ones(len(z), dtype=torch.bool) if c.soft else c.target != c.ignore_index,
    )
    if c.soft or c.smoothing:
        one_hot = None if c.soft else torch.zeros_like(z).scatter(1, torch.where(keep, c.target, 0)[:, None], 1)
        a = (inputs[1] if c.soft else one_hot) * (1 - c.smoothing) + c.smoothing / z.shape[1]
        a = a if c.weight is None else a * c.weight
        loss = (a * (c.ticks * (log_p.exp() - log_p) - c.ce * log_p)).sum(1)
    else:
        t = torch.where(keep, c.target, 0)
        lp = log_p.gather(1, t[:, None]).squeeze(1)
        loss = (1 if c.weight is None else c.weight[t]) * (c.ticks * (lp.exp() - lp) - c.ce * lp)
    out = torch.where(keep, loss, 0) * c.grad
    if c.grad_lse is not None:
        out = out + torch.where(keep, torch.logsumexp(z, 1), 0) * c.grad_lse
    return torch.autograd.grad(out.sum(), inputs)


def truth_of(call: Call) -> dict[str, Tensor]:
    """In fp64 by the reference; for fp64 in numpy's long double, since the reference's roundings are no smaller."""
    truth = call.to(F64).run(reference)
    if call.z.dtype != F64:
        return truth

    def wide(t: Tensor) -> np.ndarray:
        return t.numpy().astype(np.longdouble)

    z, (ce, ticks, s, smoothing) = wide(call.z), np.array([call.ce, call.ticks, call.softcap, call.smoothing], "g")
    capped = s * np.tanh(z / s) if s else z
    gap = capped.max(1, keepdims=True) - capped
    total = np.exp(-gap).sum(1, keepdims=True)
    p, nll = np.exp(-gap) / total, np.log(total) + gap
    keep = np.ones((len(z), 1), bool) if call.soft else (call.target != call.ignore_index).numpy()[:, None]
    w = 1 if call.weight is None else wide(call.weight)
    if call.soft:
        mass = wide(call.target)
    else:
        mass = (np.arange(z.shape[1]) == call.target.numpy()[:, None]) * np.longdouble(1)
    a = w * (mass * (1 - smoothing) + smoothing / z.shape[1])
    q = 1 - p
    each = (ce + ticks) * nll + ticks * p
    grad, grad_lse = (0 if g is None else wide(g)[:, None] for g in (call.grad, call.grad_lse))
    a_sum, b_sum = a.sum(1, keepdims=True), (a * q).sum(1, keepdims=True)
    dz = grad * (p * (ce * (a_sum - a) + ticks * (b_sum - a * q)) - a * q * (ce + ticks * q)) + grad_lse * p
    dz = dz / np.cosh(z / s) ** 2 if s else dz
    results = {"loss": (a * each).sum(1) * keep[:, 0], "dz": dz * keep, "dtarget": grad * (1 - smoothing) * w * each}
    return truth | {name: torch.from_numpy(t.astype(np.float64)) for name, t in results.items() if name in truth}


def assert_gradient(name: str, ours: Tensor, truth: Tensor, theirs: Tensor, capped: bool) -> None:
    dtype = ours.dtype
    if not truth.any():  # of one class nothing can be learned, but for the roundings of its mass
        assert ours.abs().max() < 4 * torch.finfo(dtype).eps, name
        return
    limit = error_limit(truth, dtype, relative_error(theirs.to(dtype), truth))
    if not low_precision(dtype):
        # Largest and others of a row are rounded once for all its elements: of few rows the ratio of errors is chance.
        # So it is where a softcap keeps torch's small: a capped logit's rounding is p's relative error, and a few large
        # p decide. (Over 60 draws of 33x1000 the median ratio is at most 0.9 with a softcap, and 0.5 without.)
        units = 32 if len(ours) < 16 else 8 if capped or dtype == F64 else 4
        limit = max(limit, units * typical_rounding(dtype))
    error, limit = relative_error(ours, truth), min(limit, MOST[dtype])
    assert error <= limit, f"{name}: error {error:.3g} > limit {limit:.3g} ({dtype})"


def check(call: Call, inplace: bool = False) -> dict[str, Tensor]:
    """Loss, statistics and gradients against the truth."""
    truth, theirs = truth_of(call), eager(call)
    ours = call.run(inplace=inplace)
    assert ours["loss"].dtype == ours["stats"].dtype == call.acc
    assert ours["dz"].dtype == call.z.dtype and (not call.soft or ours["dtarget"].dtype == call.target.dtype)
    eps = torch.finfo(call.acc).eps
    assert relative_error(ours["loss"], truth["loss"]) < 8 * eps
    assert ours["stats"].shape == truth["stats"].shape and ours["stats"].is_contiguous()
    for i, (a, t) in enumerate(zip(ours["stats"], truth["stats"], strict=True)):
        # Each row's own, for q and others are small where a target stands out. Rounding differences of logits costs
        # others a relative error of their size, about 30.
        assert ((a - t).abs() <= (4 if i == 0 else 64) * eps * t.abs()).all(), f"stats[{i}]"
    for name, theirs_of in zip(("dz", "dtarget"), theirs, strict=False):
        assert ours[name].shape == truth[name].shape
        assert_gradient(name, ours[name], truth[name], theirs_of, bool(call.softcap))
    return ours


def low_precision(dtype: torch.dtype) -> bool:
    return dtype in (BF16, F16)


def options_of(dtype: torch.dtype):
    """Every combination of the options, and fp32 beside the narrow dtypes."""
    for soft, smoothing, weight, softcap, lse in itertools.product(
        BOOLEANS, (0.0, 0.1), BOOLEANS, (0.0, 4.0), BOOLEANS
    ):
        for beside in (None, F32) if low_precision(dtype) and (soft or weight) else (None,):
            yield {
                "soft": soft,
                "smoothing": smoothing,
                "weight": weight,
                "softcap": softcap,
                "lse": lse,
                "beside": beside,
            }


# ---------------------------------------------------------------------------------------------------- against the truth


@each_dtype
def test_every_option(dtype):
    for (rows, classes), options in itertools.product(((1, 1), (1, 7), (33, 1000)), options_of(dtype)):
        call = draw(rows, classes, dtype, **options)
        try:
            apart = check(call)
            strided = replace(call, z=laid_out(call.z, classes + 5, 3))
            if call.soft:
                strided = replace(strided, target=laid_out(call.target, classes + 3, 1))
            inplace = strided.run(inplace=True)
            assert inplace["dz"] is strided.z
            storage = strided.z.as_strided((rows, classes + 5), (classes + 5, 1), 3)
            assert storage[:-1, classes:].isnan().all(), "written past a row"
            copied = call.run(inplace="copy")
        except AssertionError as error:
            raise AssertionError(f"{rows}x{classes}, {options}: {error}") from error
        for name, t in apart.items():
            assert same_bits(inplace[name], t) and same_bits(copied[name], t), (name, rows, classes, options)


@each_dtype
@pytest.mark.parametrize("rows, classes", [(4, 30522), (2, 128256)])
def test_wide(dtype, rows, classes):
    """The vocabularies of BERT and Llama 3: many blocks a row, several chunks of backward."""
    every = {"weight": True, "smoothing": 0.1, "softcap": 30.0, "lse": True}
    for options in ({}, {"smoothing": 0.1}, {"soft": True}, every, every | {"soft": True}):
        check(draw(rows, classes, dtype, **options))


#: Around one, two and four registers of 2 to 16 lanes; a block of 2048 columns (1024 in fp64); a chunk of 16384.
WIDTHS = [*range(1, 36), 47, 63, 64, 65, 127, 129, 1023, 1024, 1025, 2047, 2048, 2049, 2051, 4096, 4101, 16383, 16385]


@each_dtype
def test_widths(dtype):
    """Every element of each result, one by one."""
    for classes, options in itertools.product(
        WIDTHS, ({}, {"smoothing": 0.2, "softcap": 4.0}, {"soft": True, "weight": True})
    ):
        call = draw(2 if classes > 2000 else 5, classes, dtype, lse=True, **options)
        ours, truth = call.run(), truth_of(call)
        for name, t in truth.items():
            own, acc = torch.finfo(ours[name].dtype), torch.finfo(call.acc)
            limit = (
                own.eps / 2 * t.abs() + 32 * acc.eps * t.abs().amax(-1, keepdim=True) + own.smallest_normal * own.eps
            )
            assert ((ours[name].double() - t).abs() <= limit).all(), (name, classes, options)


def test_exponential():
    """Of logits (0, -x) ``others`` is exp(-x), to about one unit in the last place."""
    options = (torch.tensor([0]), None, IGNORE, 0.0, 1.0, 1.0, 0.0)
    for dtype, lowest in ((F32, -87.3), (F64, -708.3)):
        x = torch.cat([torch.linspace(lowest, 0, 40001, dtype=F64), -torch.logspace(-30, 0, 2001, dtype=F64)]).to(dtype)
        z = torch.stack([torch.zeros_like(x), x], 1)
        _, stats = native.ticks_forward(z, torch.zeros(len(x), dtype=torch.int64), *options[1:])
        wide = x.numpy().astype(np.longdouble)
        units = np.abs(stats[1].numpy().astype(np.longdouble) / np.exp(wide) - 1) / torch.finfo(dtype).eps
        # In fp32, with fused multiply-add, the last bits of ln 2 are left out.
        allowed = 1.1 + (np.abs(wide) / 40 if dtype == F32 else 0)
        assert (units < allowed).all(), (dtype, units.max())
        others = [
            native.ticks_forward(torch.tensor([[0.0, v]], dtype=dtype), *options)[1][1].item()
            for v in (0.0, -1e-30, -1e30, -INF)
        ]
        assert others == [1, 1, 0, 0]


def test_softcap():
    """Of one class ``largest`` is the capped logit, and the gradient of lse its slope."""
    for dtype in (F32, F64):
        sizes = torch.cat([torch.linspace(0, 12, 20001, dtype=F64), torch.logspace(-30, 1, 2001, dtype=F64)]).to(dtype)
        x = torch.cat([sizes, -sizes, torch.tensor([INF, -INF], dtype=dtype)])[:, None]
        loss, stats = native.ticks_forward(x, torch.zeros(len(x), dtype=torch.int64), None, IGNORE, 0.0, 1.0, 1.0, 1.0)
        zero, one = torch.zeros_like(loss), torch.ones_like(loss)
        slope, _ = native.ticks_backward(
            zero,
            one,
            x,
            torch.zeros(len(x), dtype=torch.int64),
            stats,
            None,
            IGNORE,
            0.0,
            1.0,
            1.0,
            1.0,
            True,
            False,
            False,
        )
        wide = x[:, 0].numpy().astype(np.longdouble)
        tanh = np.tanh(wide)
        for name, ours, truth, units in (
            ("tanh", stats[0], tanh, 1.2),
            ("slope", slope[:, 0], 1 / np.cosh(wide) ** 2, 4),
        ):
            error = np.abs(ours.numpy().astype(np.longdouble) - truth) / np.maximum(np.abs(truth), 1e-4000)
            assert error[np.abs(truth) > 0].max() < units * torch.finfo(dtype).eps, (dtype, name)


@each_dtype
def test_the_largest_wherever_it_is(dtype):
    """The largest so far changes in each block, in none, or is met again and again; q of the rest stays accurate."""
    classes = 7001
    ramp = torch.linspace(-20, 20, classes, dtype=F64)
    late = torch.zeros(classes, dtype=F64)
    late[-1] = 9
    rows = [ramp, -ramp, ramp.abs(), torch.zeros_like(ramp), late, torch.where(ramp.abs() < 15, 0.0, 4.0), late.flip(0)]
    rows += [torch.where(ramp < 10, -INF, ramp), torch.where(ramp > -19, -INF, ramp)]
    z = torch.stack(rows).to(dtype)
    finite = z.isfinite().all(1)
    for target in (z.argmax(1), torch.full((len(z),), classes - 1), torch.zeros(len(z), dtype=torch.int64)):
        for smoothing in (0.0, 0.1):
            call = Call(z, target, smoothing=smoothing, grad=torch.randn(len(z)).to(F64 if dtype == F64 else F32))
            ours, truth = call.run(), call.to(F64).run(reference)
            for name in ("loss", "stats"):
                torch.testing.assert_close(
                    ours[name].double(), truth[name], rtol=64 * torch.finfo(call.acc).eps, atol=0, equal_nan=True
                )
            assert relative_error(ours["dz"][finite], truth["dz"][finite]) < MOST[dtype]
            torch.testing.assert_close(
                ours["dz"].double(), truth["dz"], rtol=16 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True
            )


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize("top", [4.0, 16.0, 40.0, 80.0])
def test_a_well_predicted_token_keeps_its_gradient(dtype, top):
    places = ((4, 0), (4, 3), (1000, 999), (9000, 1), (9000, 8999))
    for (classes, where), soft in itertools.product(places, BOOLEANS):
        z = torch.zeros(1, classes, dtype=dtype)
        z[0, where] = top
        target = torch.tensor([where])
        target = torch.zeros_like(z).scatter(1, target[:, None], 1) if soft else target
        call = Call(z, target, ce=0.0, ticks=1.0, grad=torch.ones(1, dtype=dtype))
        q = (classes - 1) / (classes - 1 + torch.tensor(top, dtype=F64).exp())
        truth = (q * q / (classes - 1)).expand(classes).clone()
        truth[where] = -q * q
        kept = truth.abs() > 1e-37
        dz = call.run()["dz"][0].double()
        error = ((dz - truth).abs() / truth.abs())[kept].max() if kept.any() else 0
        assert error < 8 * torch.finfo(dtype).eps, (classes, where, error)


# ----------------------------------------------------------------------------------------------------------------- bits


@each_dtype
def test_layout_neighbours_and_threads_change_no_bit(dtype):
    for rows, classes in ((9, 1003), (5, 40001)):
        for options in ({}, {"smoothing": 0.1}, {"soft": True, "weight": True, "softcap": 5.0}):
            call = draw(rows, classes, dtype, lse=True, **options)
            expected = call.run()
            variants = {
                "strided": replace(call, z=laid_out(call.z, classes + 9, 1)),
                "expanded grads": replace(
                    call, grad=call.grad[:1].expand(rows), grad_lse=call.grad_lse[:1].expand(rows)
                ),
            }
            for name, variant in variants.items():
                if name == "expanded grads":
                    same = replace(call, grad=variant.grad.contiguous(), grad_lse=variant.grad_lse.contiguous()).run()
                else:
                    same = expected
                for key, t in variant.run().items():
                    assert same_bits(t, same[key]), (name, key, classes, options)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                for key, t in call.run().items():
                    assert same_bits(t, expected[key]), (threads, key, classes, options)
            torch.set_num_threads(1)
            alone = replace(
                call, z=call.z[3:4], target=call.target[3:4], grad=call.grad[3:4], grad_lse=call.grad_lse[3:4]
            ).run()
            assert same_bits(alone["dz"], expected["dz"][3:4]) and same_bits(alone["loss"], expected["loss"][3:4])


@each_dtype
def test_each_gradient_alone(dtype):
    call = draw(7, 2500, dtype, soft=True, weight=True, lse=True)
    both = call.run()
    for needs in itertools.product(BOOLEANS, repeat=2):
        some = call.run(needs=needs)
        for need, name in zip(needs, ("dz", "dtarget"), strict=True):
            assert same_bits(some[name], both[name]) if need else some[name].shape == (0,), needs
    hard = draw(7, 2500, dtype)
    loss, stats = native.ticks_forward(hard.z, hard.target, None, *hard.options)
    for need_dtarget in BOOLEANS:  # class indices have no gradient
        _, dtarget = native.ticks_backward(
            loss, None, hard.z, hard.target, stats, None, *hard.options, True, need_dtarget, False
        )
        assert dtarget.shape == (0,)


def test_rows_more_than_2_to_the_31_elements_apart():
    classes, stride = 1001, 2**31 + 5
    storage = torch.empty(stride + classes, dtype=BF16)  # its pages are never touched, but for the two rows'
    call = draw(2, classes, BF16)
    z = storage.as_strided((2, classes), (stride, 1))
    z.copy_(call.z)
    expected, far = call.run(), replace(call, z=z).run(inplace=True)
    assert all(same_bits(far[name], t) for name, t in expected.items())


# ---------------------------------------------------------------------------------------------------------------- edges


@each_dtype
def test_infinities_and_nan_as_the_reference(dtype):
    for classes, options in itertools.product((7, 100, 5003), ({}, {"smoothing": 0.1}, {"soft": True})):
        clean = draw(8, classes, dtype, lse=True, **options)
        expected = clean.run()
        if not clean.soft:
            clean.target[2] = 1
        for bad, column in itertools.product((INF, -INF, NAN), (0, classes // 2, classes - 1)):
            z = clean.z.clone()
            z[2, column] = bad
            call = replace(clean, z=z)
            ours, truth = call.run(), call.to(F64).run(reference)
            rest = torch.arange(8) != 2
            for name in expected:
                across = (slice(None), rest) if name == "stats" else rest
                assert same_bits(ours[name][across], clean.run()[name][across]), (name, bad, column)
            for name in ("loss", "dz", *(["dtarget"] if clean.soft else [])):
                torch.testing.assert_close(
                    ours[name][2].double(),
                    truth[name][2],
                    rtol=16 * torch.finfo(ours[name].dtype).eps,
                    atol=1e-5,
                    equal_nan=True,
                )
        for row in (torch.full((classes,), -INF), torch.full((classes,), NAN)):
            z = clean.z.clone()
            z[2] = row
            ours = replace(clean, z=z).run()
            assert ours["loss"][2].isnan() and ours["dz"][2].isnan().all(), (row[0], classes, options)


@each_dtype
def test_masked_classes_without_mass_count_for_nothing(dtype):
    """-inf where the target, or the class weight, is 0: as if the class were not there."""
    classes = 3000
    call = draw(6, classes, dtype, soft=True)
    target, weight = call.target.clone(), torch.rand(classes).to(dtype)
    z = call.z.clone()
    z[:, :2100] = -INF  # the first block whole
    target[:, :2100] = 0
    short = replace(
        call, z=z[:, 2100:].contiguous(), target=target[:, 2100:].contiguous(), weight=weight[2100:].contiguous()
    )
    ours, expected = replace(call, z=z, target=target, weight=weight).run(), short.to(F64).run(reference)
    assert relative_error(ours["loss"], expected["loss"]) < 16 * torch.finfo(call.acc).eps
    assert not ours["dz"][:, :2100].any()
    assert relative_error(ours["dz"][:, 2100:], expected["dz"]) < MOST[dtype]
    weight[:2100] = 0
    smoothed = replace(call, z=z, target=torch.full((6,), 2500), weight=weight, smoothing=0.3)
    assert smoothed.run()["loss"].isfinite().all()
    assert replace(smoothed, weight=None).run()["loss"].isposinf().all()


@each_dtype
def test_ignored_rows(dtype):
    """Whatever they hold, also in place."""
    for ignore, options in itertools.product((IGNORE, -1, 3, 10**12), ({}, {"smoothing": 0.1}, {"softcap": 2.0})):
        call = draw(9, 20000, dtype, lse=True, ignore_index=ignore, weight=True, **options)
        call.target[call.target == IGNORE] = 5
        call.target[call.target == ignore] = 4
        expected = call.run()
        call.target[[1, 4, 8]] = ignore
        call.z[1], call.z[4] = NAN, INF
        ignored, kept = [1, 4, 8], [0, 2, 3, 5, 6, 7]
        for ours in (call.run(), call.run(inplace="copy")):
            assert not ours["loss"][ignored].any() and not ours["stats"][:, ignored].any()
            assert same_bits(ours["dz"][ignored], torch.zeros(3, 20000, dtype=dtype))
            assert same_bits(ours["dz"][kept], expected["dz"][kept]) and same_bits(
                ours["loss"][kept], expected["loss"][kept]
            )


def test_every_element_is_written():
    """Nothing shows through of what lay in the memory of the outputs."""
    for rows, classes in ((3, 1), (9, 17), (2, 7001), (3, 40001)):
        for options in ({}, {"soft": True, "softcap": 3.0}):
            for dtype in DTYPES:
                call = draw(rows, classes, dtype, **options)
                before = {name: t.clone() for name, t in call.run().items()}
                blocks = [torch.full_like(t, NAN) for t in before.values() for _ in range(3)]
                del blocks
                for name, t in call.run().items():
                    assert not t.isnan().any() and same_bits(t, before[name]), (name, rows, classes)


def test_out_of_range_is_an_index_error():
    z = torch.randn(3, 5)
    good = Call(z, torch.tensor([0, 4, IGNORE]), grad=torch.ones(3))
    _, stats = native.ticks_forward(z, good.target, None, *good.options)
    good.run()
    for bad in (5, 7, -1, -(2**62), 2**62):
        target = torch.tensor([0, bad, 4])
        for options in (good.options, (IGNORE, 0.1, *good.options[2:])):
            with pytest.raises(IndexError, match=f"^target {bad} is out of range for 5 classes$"):
                native.ticks_forward(z, target, None, *options)
        for inplace in BOOLEANS:
            before = z.clone()
            with pytest.raises(IndexError, match=f"^target {bad} is out of range for 5 classes$"):
                native.ticks_backward(torch.ones(3), None, z, target, stats, None, *good.options, True, False, inplace)
            assert torch.equal(z, before)


def test_no_rows():
    for target in (torch.empty(0, dtype=torch.int64), torch.empty(0, 5)):
        results = Call(torch.empty(0, 5), target).run()
        assert results["loss"].shape == (0,) and results["dz"].shape == (0, 5)


def good_arguments(**changes):
    arguments = {
        "grad": torch.ones(4),
        "grad_lse": torch.ones(4),
        "z": torch.randn(4, 6),
        "target": torch.tensor([0, 5, 2, 1]),
        "stats": torch.ones(3, 4),
        "weight": torch.ones(6),
        "ignore_index": IGNORE,
        "smoothing": 0.0,
        "ce": 1.0,
        "ticks": 1.0,
        "softcap": 0.0,
        "need_dz": True,
        "need_dtarget": False,
        "inplace": False,
    }
    return arguments | changes


BAD = {
    "1-D z": ({"z": torch.randn(24)}, r"z has shape \(24,\), expected 2 dimensions"),
    "integer z": ({"z": torch.ones(4, 6, dtype=torch.int32)}, "z has dtype Int, expected Double"),
    "transposed z": ({"z": torch.randn(6, 4).t()}, "z has stride 4 in its last dimension, expected 1"),
    "no classes": ({"z": torch.randn(4, 0)}, r"z has shape \(4, 0\), expected at least one class"),
    "short target": ({"target": torch.zeros(3, dtype=torch.int64)}, r"target has shape \(3,\), expected \(4,\)"),
    "strided target": ({"target": torch.zeros(8, dtype=torch.int64)[::2]}, "target has shape.*contiguous"),
    "int32 target": ({"target": torch.zeros(4, dtype=torch.int32)}, "target has dtype Int"),
    "fp64 target": ({"target": torch.zeros(4, 6, dtype=F64)}, "target has dtype Double, z has Float"),
    "wide target": (
        {"target": torch.zeros(4, 7), "stats": torch.ones(4, 4)},
        r"target has shape \(4, 7\), z has \(4, 6\)",
    ),
    "transposed target": ({"target": torch.zeros(6, 4).t()}, "target has stride 4 in its last dimension"),
    "short weight": ({"weight": torch.ones(5)}, r"weight has shape \(5,\), expected \(6,\)"),
    "strided weight": ({"weight": torch.ones(12)[::2]}, "weight has shape.*contiguous"),
    "weight dtype": ({"weight": torch.ones(6, dtype=BF16)}, "weight has dtype BFloat16, z has Float"),
    "short stats": ({"stats": torch.ones(4, 4)}, r"stats has shape \(4, 4\), expected \(3, 4\)"),
    "stats of no smoothing": ({"smoothing": 0.1}, r"stats has shape \(3, 4\), expected \(4, 4\)"),
    "stats dtype": ({"stats": torch.ones(3, 4, dtype=F64)}, "stats has dtype Double, expected Float"),
    "strided stats": ({"stats": torch.ones(4, 3).t()}, "stats is not a contiguous"),
    "short grad": ({"grad": torch.ones(3)}, r"grad has shape \(3,\), expected \(4,\)"),
    "grad dtype": ({"grad": torch.ones(4, dtype=BF16)}, "grad has dtype BFloat16, expected Float"),
    "2-D grad": ({"grad": torch.ones(4, 1)}, r"grad has shape \(4, 1\)"),
    "short grad_lse": ({"grad_lse": torch.ones(5)}, r"grad_lse has shape \(5,\), expected \(4,\)"),
    "overlapping rows in place": (
        {"z": torch.randn(1, 6).expand(4, 6), "inplace": True},
        "rows lie 0 elements apart, expected at least 6",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    changes, message = BAD[case]
    native.ticks_backward(*good_arguments().values())
    arguments = good_arguments(**changes)
    with pytest.raises(RuntimeError, match=message):
        native.ticks_backward(*arguments.values())
    if changes.keys() <= {"z", "target", "weight"}:
        forward = ("z", "target", "weight", "ignore_index", "smoothing", "ce", "ticks", "softcap")
        with pytest.raises(RuntimeError, match=message):
            native.ticks_forward(*(arguments[name] for name in forward))


def test_refuses_freed_memory():
    for name in ("grad", "grad_lse", "z", "target", "stats", "weight"):
        arguments = good_arguments()
        arguments[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"{name} has shape .* no storage"):
            native.ticks_backward(*arguments.values())


@each_dtype
def test_operators(dtype):
    """torch's own checks of the operators: schemas against what they do, and fakes against their results."""
    for options in ({}, {"soft": True, "weight": True, "lse": True}):
        call = draw(6, 10, dtype, **options)
        forward = (call.z, call.target, call.weight, *call.options)
        stats = native.ticks_forward(*forward)[1]
        backward = (call.grad, call.grad_lse, call.z, call.target, stats, call.weight, *call.options)
        ops = torch.ops.fused_norm
        for operator, arguments in (
            (ops.ticks_forward, forward),
            (ops.ticks_backward, (*backward, True, call.soft)),
            (ops.ticks_backward, (*backward, call.soft, False)),
            (ops.ticks_backward_inplace, (*backward, call.soft)),
        ):
            # The one that writes in place is called by backends alone, after tracing: it has no fake.
            utils = ("test_schema",) if operator is ops.ticks_backward_inplace else ("test_schema", "test_faketensor")
            torch.library.opcheck(operator.default, arguments, test_utils=utils)
