"""The gradient checks: each kind of mistake, planted, is found by the modes that should find it, and by no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fused_norm import autograd, dispatch, reference, testing
from fused_norm.testing import GradCheck, Operation, Sample, TorchLimit

FP64 = torch.float64
VJP, JVP = 6, 6  # one check for each pair of dtypes


def failing(op: str, backend: str = "reference", only: str = "") -> tuple[dict[str, int], list[testing.GradResult]]:
    """How many checks of each mode fail, and the results of all that do."""
    checks = [c for c in testing.gradchecks(["cpu"], [backend]) if c.op == op and only in str(c)]
    failed = [r for r in (c.result() for c in checks) if r.status == "fail"]
    return {mode: sum(r.check.mode == mode for r in failed) for mode in {r.check.mode for r in failed}}, failed


@pytest.fixture
def plant(monkeypatch) -> Iterator[Callable[..., None]]:
    """``plant(function=change)``: the reference backend with ``change(arguments by name, results)`` for a function's
    results. The truth, which is the reference itself, stays right."""

    def planted(**changes: Callable) -> None:
        names = {name: getattr(reference, name) for name in dir(reference) if not name.startswith("__")}

        def changed(name: str, change: Callable) -> Callable:
            original = names[name]
            parameters = original.__code__.co_varnames[: original.__code__.co_argcount]
            return lambda *args: change(SimpleNamespace(**dict(zip(parameters, args, strict=True))), original(*args))

        module = SimpleNamespace(**names | {n: changed(n, c) for n, c in changes.items()})
        find = dispatch.load
        monkeypatch.setattr(dispatch, "load", lambda name: module if name == "reference" else find(name))
        dispatch._named.cache_clear()

    yield planted
    monkeypatch.undo()
    dispatch._named.cache_clear()


def scaled(index: int, by: float = 1.01, when: Callable = lambda a: True) -> Callable:
    def change(arguments: SimpleNamespace, results: tuple) -> tuple:
        if results[index] is None or not when(arguments):
            return results
        return tuple(r * by if i == index else r for i, r in enumerate(results))

    return change


#: What is wrong, the operation, and how many checks of each mode find it. gradcheck and gradgradcheck look at first and
#: second derivatives; the Hessian is forward over reverse, of a function in which dy depends on y.
FAULTS = {
    "dx": ("rms_norm", {"norm_backward": scaled(0)}, {"vjp": VJP, "gradcheck": 1, "gradgradcheck": 1, "hessian": 1}),
    "dw": ("rms_norm", {"norm_backward": scaled(1)}, {"vjp": VJP, "gradcheck": 1, "gradgradcheck": 1, "hessian": 1}),
    "db": ("layer_norm", {"norm_backward": scaled(2)}, {"vjp": VJP, "gradcheck": 1, "gradgradcheck": 1, "hessian": 1}),
    "jvp": (
        "rms_norm",
        {"norm_double_backward": scaled(0, when=lambda a: a.dy is None)},
        {"jvp": JVP, "gradcheck": 1, "hessian": 1},
    ),
    "double backward in x": (
        "rms_norm",
        {"norm_double_backward": scaled(1)},
        {"gradgradcheck": 1, "hessian": 1},
    ),
    "double backward in dy": (
        "rms_norm",
        {"norm_double_backward": scaled(0, when=lambda a: a.dy is not None)},
        {"gradgradcheck": 1},
    ),
    "a derivative of another dtype": (
        "rms_norm",
        {"norm_double_backward": lambda a, results: (results[0].double(), *results[1:]) if a.need_ddy else results},
        {"jvp": JVP - 1},
    ),
    "fp32 dx of few digits": (
        "rms_norm",
        {"norm_backward": scaled(0, by=1 + 1e-6, when=lambda a: a.x.dtype == torch.float32)},
        {"vjp": 1},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_derivative_is_found(plant, fault: str) -> None:
    op, changes, expected = FAULTS[fault]
    plant(**changes)
    assert failing(op)[0] == expected


def test_the_other_operations_and_backends_do_not_mind(plant) -> None:
    plant(norm_backward=scaled(2))
    assert failing("rms_norm", only="cpu-float32-vjp")[0] == {}
    assert failing("layer_norm", backend="torch", only="cpu-float32-vjp")[0] == {}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("Norm", {"vmap": 1}),  # a Hessian batches directions, not x
        ("NormBackward", {"vmap": 1, "hessian": 1}),
    ],
)
def test_a_vmap_rule_that_mixes_examples_is_found(monkeypatch, function: str, expected: dict[str, int]) -> None:
    rule = getattr(autograd, function).vmap

    def mixed(info, in_dims, *args):
        results, dims = rule(info, in_dims, *args)
        return (results[0].roll(1, 0), *results[1:]), dims

    monkeypatch.setattr(getattr(autograd, function), "vmap", staticmethod(mixed))
    assert failing("rms_norm", only="float64")[0] == expected


def test_an_exception_is_a_failure_and_tells_where(plant) -> None:
    def broken(arguments, results):
        raise RuntimeError("planted")

    plant(norm_backward=broken)
    _, (result,) = failing("rms_norm", only="cpu-float32-vjp")
    assert "3x4x37: RuntimeError: planted" in result.failure
    assert "Traceback" in result.detail and "in broken" in result.detail


def test_nan_is_a_failure(plant) -> None:
    plant(norm_backward=scaled(1, by=float("nan")))
    _, (result,) = failing("rms_norm", only="float64-vjp")
    assert result.worst.ratio == float("inf") and "dw: error inf > limit" in result.failure


def test_a_failure_names_tensor_error_limit_and_case(plant) -> None:
    plant(norm_backward=scaled(0))
    _, (result,) = failing("rms_norm", only="cpu-float32-vjp")
    lines = result.failure.splitlines()
    assert any(line.startswith("12x65, transposed: dx: error 0.01 > limit") for line in lines)
    assert all(": dx: error" in line for line in lines)
    assert result.worst.name == "dx" and result.worst.ratio > 1e4
    check = result.check
    assert check.run() == result.failure
    ((same, failure, seconds),) = testing.run_gradchecks([check])
    assert same is check and failure == result.failure and seconds > 0


# ----------------------------------------------------------------------------------------------- what torch gets wrong


def test_what_torch_gets_wrong_is_wrong_here() -> None:
    """Were it right now, the entry should go."""
    checks = [c for c in testing.gradchecks(["cpu"], ["torch"]) if c.expected_failure is not None]
    modes = "float64-hessian", "bfloat16+float32-jvp", "float16+float32-jvp"
    assert {str(c) for c in checks} == {f"{op}-torch-cpu-{m}" for op in ("layer_norm", "add_layer_norm") for m in modes}
    for check in checks:
        result = check.result()
        assert result.status == "xfail", result
        assert check.run() is None, "no reason for a user's CI to fail"
    assert "d2/dw dx" in GradCheck("layer_norm", "torch", "cpu", FP64, "hessian").result().failure


@pytest.mark.parametrize(("match", "status"), [("no such words", "fail"), ("dx: error", "xfail")])
def test_a_failure_of_another_kind_is_not_expected(monkeypatch, match: str, status: str) -> None:
    limit = TorchLimit(lambda check: check.mode == "vjp", match, "known")
    op = testing.OPERATIONS["rms_norm"]

    def another_truth(sample: Sample, upstream: tuple) -> tuple:
        y, dx, *others = op.vjp(sample, upstream)
        return y, dx * 1.01, *others

    monkeypatch.setitem(testing.OPERATIONS, "rms_norm", replace(op, vjp=another_truth, torch_limits=(limit,)))
    check = GradCheck("rms_norm", "torch", "cpu", FP64, "vjp")
    assert check.result().status == status
    assert (check.run() is None) == (status == "xfail")


def test_a_failure_that_does_not_come_is_told(monkeypatch) -> None:
    limit = TorchLimit(lambda check: check.mode == "vjp", "error", "known")
    monkeypatch.setitem(testing.OPERATIONS, "rms_norm", replace(testing.OPERATIONS["rms_norm"], torch_limits=(limit,)))
    check = GradCheck("rms_norm", "torch", "cpu", FP64, "vjp")
    assert check.result().status == "xpass" and check.run() is None
    assert GradCheck("rms_norm", "reference", "cpu", FP64, "vjp").result().status == "ok", "it is torch's alone"


def test_torch_is_not_excused_by_being_wrong(monkeypatch) -> None:
    """Its own error is part of its limit, but only up to some roundings."""
    original = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *a, **k: original(*a, **k) * 1.01)
    assert GradCheck("rms_norm", "torch", "cpu", torch.float32, "jvp").result().status == "fail"
    assert GradCheck("rms_norm", "torch", "cpu", torch.float16, "vjp").result().status == "fail"


# ------------------------------------------------------------------------------------------------------ the operations


def test_an_operation_is_one_entry(monkeypatch) -> None:
    """With two outputs, no truth but its formula, and modes of its own choice."""

    def samples(mode: str, slow: bool, draw: testing.Draw) -> Iterator[Sample]:
        yield Sample("2x3", {"x": draw(2, 3), "w": draw.param(3)})

    def scale_and_square(namespace, sample, x, w):
        return x * w, x.square()

    entry = Operation(
        "scale_and_square",
        "norm",
        samples,
        call=scale_and_square,
        formula=lambda sample, x, w: (x * w, x * x),
        limit=lambda name: lambda truth, dtype, torch_error: 4 * torch.finfo(dtype).eps,
        outputs=("scaled", "square"),
        modes=("vjp", "jvp", "gradcheck", "vmap", "hessian"),
    )
    monkeypatch.setitem(testing.OPERATIONS, entry.name, entry)
    checks = [c for c in testing.gradchecks(["cpu"], ["reference"]) if c.op == entry.name]
    assert sorted(c.mode for c in checks) == sorted(["vjp", "jvp"] * 4 + ["gradcheck", "vmap", "hessian"])
    for check in checks:
        assert check.result().status == "ok", check.result()
    monkeypatch.setitem(
        testing.OPERATIONS, entry.name, replace(entry, formula=lambda sample, x, w: (x * w, x.square() * 1.1))
    )
    assert failing(entry.name)[0] == {"vjp": 4, "jvp": 4, "hessian": 1}


@pytest.mark.parametrize("op", testing.OPERATIONS)
def test_every_operation_has_every_mode(op: str) -> None:
    checks = [c for c in testing.gradchecks(["cpu"], ["reference"]) if c.op == op]
    pairs = 6 if op.endswith("norm") else 4
    assert len([c for c in checks if c.mode == "vjp"]) == len([c for c in checks if c.mode == "jvp"]) == pairs
    fp64 = [c.mode for c in checks if c.dtype == FP64]
    assert fp64 == ["vjp", "jvp", "gradcheck", "gradgradcheck", "vmap", "hessian"]
    assert len({str(c) for c in checks}) == len(checks)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_the_limits_hold_whatever_the_seed(op: str, mode: str) -> None:
    for seed in (1, 2):
        for check in testing.gradchecks(["cpu"]):
            if check.op == op and check.mode == mode and check.backend in ("reference", "torch"):
                assert check.run(seed) is None


def test_the_seed_decides_the_numbers_and_nothing_else_does() -> None:
    check = GradCheck("rms_norm", "reference", "cpu", torch.float32, "vjp")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = check.result(3)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are their own"
    torch.manual_seed(2)
    assert check.result(3).worst == first.worst
    assert check.result(4).worst != first.worst


def test_what_is_not_checked_has_a_reason(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delattr(dispatch.load("native"), "ticks_forward")
    left_out = {(op, backend): reason for op, backend, _, reason in testing.not_checked(["cpu"])}
    assert "interpreter" in left_out["layer_norm", "triton"]
    assert left_out["ticks_loss", "native"] == "it has no ticks kernel"
    checked = {(c.op, c.backend) for c in testing.gradchecks(["cpu"])}
    assert not checked & set(left_out)
    assert checked | set(left_out) == {(op, b) for op in testing.OPERATIONS for b in dispatch.BACKENDS}


def test_a_backend_asked_for_by_name_fails_where_it_is_missing(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check = next(testing.gradchecks(["cpu"], ["triton"]))
    assert "interpreter" in check.run()


def test_a_backend_without_such_a_kernel_has_no_check_to_fail(monkeypatch) -> None:
    if dispatch.unavailable("native", "norm", "cpu"):
        pytest.skip("native is missing here")
    assert {c.op for c in testing.gradchecks(["cpu"], ["native"])} == set(testing.OPERATIONS)
    monkeypatch.delattr(dispatch.load("native"), "ticks_forward")
    assert {c.op for c in testing.gradchecks(["cpu"], ["native"])} == {
        *("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
    }
