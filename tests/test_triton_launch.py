"""What stands between a call and its kernel: :class:`fused_norm.backends.triton.common.Launch`.

Under a driver that launches nothing and writes down what it is given, so that the path of a GPU runs here; kernels are
really compiled, for sm_90.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

triton = pytest.importorskip("triton")

from triton_kernels import launches_written_down, needs_compiler  # noqa: E402

from fused_norm.backends import triton as backend  # noqa: E402

pytestmark = needs_compiler


@pytest.fixture
def launched() -> Iterator[list[tuple]]:
    """(kernel, arguments of its launcher) of every launch, in order."""
    with launches_written_down() as found:
        yield found


def calls() -> dict[str, tuple]:
    """Each kernel's function and arguments."""
    x, dy, ds = torch.randn(200, 64), torch.randn(200, 64), torch.randn(200, 64)
    w, b, stats, seed = torch.ones(64), torch.zeros(64), torch.ones(2, 200), torch.tensor([1])
    z, target, t_stats = torch.randn(5, 96), torch.arange(5), torch.ones(3, 5)
    options = (-100, 0.0, 1.0, 1e-3, 0.0)
    f32 = torch.float32
    return {
        "norm_forward": (x, w, b, 64, 1, 1e-5, False, True),
        "norm_backward": (dy, x, stats, w, 64, 1, False, f32, True, True, True),
        "norm_double_backward": (ds, w, b, dy, x, stats, w, 64, 1, False, f32, True, True, True),
        "add_norm_forward": (x, dy, w, b, seed, 64, 1e-5, False, 0.1, True, False),
        "add_norm_backward": (dy, ds, x, stats, w, seed, 64, False, 0.1, f32, f32, True, True, True, True),
        "ticks_forward": (z, target, None, *options),
        "ticks_backward": (torch.ones(5), None, z, target, t_stats, None, *options, True, False, False),
    }


def values(kernel: object, args: tuple) -> list[object]:
    """What the kernel gets, of the launcher's arguments: pointers by whether there is one, the rest as it is."""
    given = zip(kernel.arg_names, args[9:], strict=True)  # after grid, stream, function, metadata, hooks
    return ["pointer" if name.endswith("_ptr") and a is not None else a for name, a in given]


@pytest.mark.parametrize("name", list(calls()))
def test_a_second_call_hands_over_what_triton_does(name: str, launched: list[tuple]) -> None:
    args = calls()[name]
    getattr(backend, name)(*args)
    first = list(launched)
    launched.clear()
    getattr(backend, name)(*args)
    assert (
        len(first)
        == len(launched)
        == (2 if name in ("norm_backward", "norm_double_backward", "add_norm_backward") else 1)
    )
    for (kernel, by_triton), (again, ours) in zip(first, launched, strict=True):
        assert kernel is again
        # By Triton tensors, by us addresses; a parameter that stands at the wrong place would differ.
        assert any(isinstance(a, torch.Tensor) for a in by_triton) and not any(
            isinstance(a, torch.Tensor) for a in ours
        )
        assert len(by_triton) == len(ours) == 9 + len(kernel.arg_names)
        assert values(kernel, by_triton) == values(kernel, ours)
        assert by_triton[:6] == ours[:6] and ours[3] == 77 and ours[6:9] == (None,) * 3


def test_addresses_are_those_of_the_tensors(launched: list[tuple]) -> None:
    x, w, b, *rest = calls()["norm_forward"]
    backend.norm_forward(x, w, b, *rest)
    y, stats = backend.norm_forward(x, w, b, *rest)
    kernel, args = launched[-1]
    given = dict(zip(kernel.arg_names, args[9:], strict=True))
    expected = {"x_ptr": x, "weight_ptr": w, "bias_ptr": b, "y_ptr": y, "stats_ptr": stats}
    assert {k: given[k] for k in expected} == {k: t.data_ptr() for k, t in expected.items()}
    assert given["residual_ptr"] is None and given["n"] == 64 and given["total_rows"] == 200


def test_another_alignment_or_dtype_is_another_kernel(launched: list[tuple]) -> None:
    x, w, b, *rest = calls()["norm_forward"]
    shifted = torch.randn(200 * 64 + 1)[1:].view(200, 64)
    for args in (
        (x, w, b),
        (shifted, w, b),
        (x, None, None),
        (x, w, None),
        (x.half(), w, b),
        (x.half(), w.half(), b.half()),
    ):
        for _ in range(2):
            backend.norm_forward(*args, *rest)
    assert len(launched) == 12
    (compiled,) = (c[0] for c in launched[0][0].device_caches.values())
    assert len(compiled) == 6


def test_a_profiler_hears_of_every_launch(launched: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    args = calls()["norm_forward"]
    backend.norm_forward(*args)
    heard = []
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(heard.append)
    try:
        backend.norm_forward(*args)
        assert launched[-1][1][7] is hook
    finally:
        hook.remove(heard.append)


def test_freed_memory_is_never_handed_over(launched: list[tuple]) -> None:
    x, w, b, *rest = calls()["norm_forward"]
    backend.norm_forward(x, w, b, *rest)
    w = w.clone()
    w.untyped_storage().resize_(0)
    count = len(launched)
    with pytest.raises(RuntimeError, match=r"weight has shape \(64,\) and no storage"):
        backend.norm_forward(x, w, b, *rest)
    assert len(launched) == count
