"""The native CUDA forward kernel on a GPU.

The tests marked ``small`` also run under compute-sanitizer (``make gpu``), with memory that torch does not cache: each
allocation may wait for the device, and none can be captured.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_norm.backends import native
from fused_norm.testing import NormResult, assert_norm_close, norm_truth, relative_error

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.unavailable("cuda") is not None, reason=str(native.unavailable("cuda"))),
]

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TYPES = ((FP64, FP64), (FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32))  # of x, of weight and bias

#: In registers (part of a warp, a warp, a block), element by element, in shared memory.
SMALL_SHAPES = ((50, 1), (50, 2), (30, 7), (9, 63), (70, 16), (33, 100), (5, 768), (3, 4097), (2, 8200), (2, 20008))

#: Many rows; the widths of the benchmarks; the widest that the contract names, and wider than any shared memory.
LARGE_SHAPES = ((1 << 20, 3), (4096, 1024), (1024, 4096), (512, 16384), (64, 65536), (16, 262144), (2, (1 << 20) + 8))

each_type = pytest.mark.parametrize("types", TYPES, ids=lambda t: "/".join(str(d)[6:] for d in dict.fromkeys(t)))
each_op = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])


def draw(rows: int, n: int, types: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
    x, w, b = torch.randn(rows, n) + 0.5, 1 + 0.3 * torch.randn(n), 0.3 * torch.randn(n)
    return x.to(DEVICE, types[0]), w.to(DEVICE, types[1]), b.to(DEVICE, types[1])


def forward(
    x: Tensor, w: Tensor | None = None, b: Tensor | None = None, rms: bool = False, groups: int = 1, eps: float = 1e-5
):
    return native.norm_forward(x, w, b, x.shape[-1], groups, eps, rms, True)


def by_torch(x: Tensor, w: Tensor, b: Tensor | None, rms: bool) -> Tensor | None:
    """torch's result, where torch takes these types on this device."""
    if w.dtype != x.dtype:
        return None
    n = x.shape[-1]
    return F.rms_norm(x, (n,), w, 1e-5) if rms else F.layer_norm(x, (n,), w, b, 1e-5)


def check(rows: int, n: int, types: tuple[torch.dtype, torch.dtype], rms: bool) -> None:
    x, w, b = draw(rows, n, types)
    b = None if rms else b
    y, stats = forward(x, w, b, rms)
    truth = norm_truth(x, w, b, torch.zeros_like(x), n, 1e-5, rms)
    assert_norm_close(NormResult(y), truth, NormResult(by_torch(x, w, b, rms)))
    assert stats.shape == (1 if rms else 2, rows) and stats.dtype == (FP64 if types[0] == FP64 else FP32)
    x64 = x.double()
    mean = x64.new_zeros(rows) if rms else x64.mean(1)
    rstd = ((x64 - mean[:, None]).square().mean(1) + 1e-5).rsqrt()
    assert relative_error(stats[0], rstd) < 8 * torch.finfo(stats.dtype).eps
    if not rms:
        assert relative_error(stats[1], mean) < 8 * torch.finfo(stats.dtype).eps


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.small
@each_op
@each_type
def test_small_shapes(types: tuple[torch.dtype, torch.dtype], rms: bool, poisoned_empty: None) -> None:
    for rows, n in SMALL_SHAPES:
        check(rows, n, types, rms)


@each_op
@each_type
def test_large_shapes(types: tuple[torch.dtype, torch.dtype], rms: bool, poisoned_empty: None) -> None:
    for rows, n in LARGE_SHAPES:
        check(rows, n, types, rms)


@pytest.mark.small
@pytest.mark.parametrize("n", [64, 768, 4096, 20000])
@each_type
def test_alignment_strides_and_neighbours_change_no_bit(types: tuple[torch.dtype, torch.dtype], n: int) -> None:
    x, w, b = draw(4, n, types)
    y, stats = forward(x, w, b)

    def misaligned(t: Tensor, by: int) -> Tensor:
        moved = t.new_empty(t.numel() + by)[by:].view(t.shape)
        return moved.copy_(t)

    def strided(gap: int) -> Tensor:
        return x.new_full((4, n + gap), math.nan)[:, :n].copy_(x)

    calls = [
        (misaligned(x, 1), w, b),
        (x, misaligned(w, 1), b),
        (x, w, misaligned(b, 1)),
        (strided(16), w, b),
        (strided(1), w, b),
    ]
    for call in calls:
        for ours, first in zip(forward(*call), (y, stats), strict=True):
            assert_same_bits(ours, first)
    for m in range(4):
        assert_same_bits(forward(x[m : m + 1], w, b)[0][0], y[m])
    assert_same_bits(forward(x[:1].expand(3, n), w, b)[0], y[:1].expand(3, n))
    assert_same_bits(forward(x, w, b)[0], y)


@pytest.mark.small
def test_parameters_per_group() -> None:
    x, w, b = draw(12, 100, (FP32, FP32))
    ws, bs = torch.stack([w, 2 * w, w - 1]), torch.stack([b, b + 1, -b])
    y, _ = forward(x, ws, bs, groups=3)
    for g in range(3):
        assert_same_bits(y[4 * g : 4 * g + 4], forward(x[4 * g : 4 * g + 4], ws[g], bs[g])[0])
    assert_same_bits(forward(x, w, b, groups=3)[0], forward(x, w, b)[0])


@pytest.mark.small
@pytest.mark.parametrize("n", [64, 100, 768, 20000])
def test_one_parameter_shared_and_one_per_group(n: int) -> None:
    x, w, b = draw(4, n, (FP32, FP32))
    ws, bs = torch.stack([w, w - 1]), torch.stack([b, b + 1])
    for weight, bias in ((ws, b), (w, bs)):
        y, _ = forward(x, weight, bias, groups=2)
        for g in range(2):
            own = (p if p.dim() == 1 else p[g] for p in (weight, bias))
            assert_same_bits(y[2 * g : 2 * g + 2], forward(x[2 * g : 2 * g + 2], *own)[0])


def test_no_memory_for_the_results_is_torchs_own_error() -> None:
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("before torch 2.13 the stable ABI does not tell the reason")
    x = torch.randn(1, 1024, device=DEVICE).expand(1 << 30, 1024)
    with pytest.raises(torch.OutOfMemoryError, match=r"norm_forward: no tensor of shape .*CUDA out of memory"):
        forward(x)


def test_every_device_with_code_says_so() -> None:
    for device in range(torch.cuda.device_count()):
        reason = native.cuda_reason(device)
        with torch.cuda.device(device):
            x = torch.randn(2, 64, device="cuda")
            if reason is None:
                assert forward(x)[0].isfinite().all()
            else:
                assert "it has no code for sm_" in reason and f"cuda:{device}" in reason
    assert "invalid device" in native.cuda_reason(torch.cuda.device_count())


@pytest.mark.small
@pytest.mark.parametrize("n", [64, 100, 768, 9000])
def test_nan_inf_and_constant_rows(n: int) -> None:
    x = torch.randn(5, n, device=DEVICE)
    good = forward(x)[0]
    bad = x.clone()
    bad[1, n // 2], bad[2, n - 1], bad[3] = math.nan, math.inf, 7.3
    y, stats = forward(bad)
    assert_same_bits(y[[0, 4]], good[[0, 4]])
    assert y[1:3].isnan().all()
    assert y[3].eq(0).all() and stats[1, 3] == bad[3, 0]
    assert forward(bad, eps=0.0)[0][3].isnan().all()
    y = forward(bad, rms=True)[0]
    assert y[2, n - 1].isnan() and y[2, : n - 1].eq(0).all()


@pytest.mark.small
def test_a_large_offset_and_an_outlier_in_front() -> None:
    y = forward(torch.randn(4, 4096, device=DEVICE) + 1e6)[0]
    assert (y.std(dim=1) - 1).abs().max() < 1e-2
    x, w, b = draw(8, 4096, (FP32, FP32))
    x[:, 0] += 100
    truth = norm_truth(x, w, b, torch.zeros_like(x), 4096, 1e-5, False)
    assert_norm_close(NormResult(forward(x, w, b)[0]), truth, NormResult(by_torch(x, w, b, False)))


def test_it_runs_on_the_current_stream() -> None:
    x, w, b = draw(64, 1000, (FP32, FP32))
    expected = forward(2 * x, w, b)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what another stream launches now runs before x is doubled
        x.mul_(2)
        y = forward(x, w, b)[0]
    stream.synchronize()
    assert_same_bits(y, expected)


def test_it_never_waits_for_the_device() -> None:
    x, w, b = draw(4, 20000, (FP32, FP32))
    busy, done = torch.cuda.Event(), torch.cuda.Event()
    forward(x, w, b)  # the kernel is loaded
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    busy.record()
    forward(x, w, b)
    assert not busy.query()
    done.record()
    done.synchronize()


@pytest.mark.parametrize("n", [768, 20000])  # with and without more shared memory than is granted unasked
def test_cuda_graph(n: int) -> None:
    x, w, b = draw(16, n, (BF16, FP32))
    forward(x, w, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, stats = forward(x, w, b)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip((y, stats), forward(x, w, b), strict=True):
        assert_same_bits(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_not_the_current_one() -> None:
    x, w, b = draw(8, 768, (FP32, FP32))
    expected = forward(x, w, b)[0]
    y = forward(*(t.to("cuda:1") for t in (x, w, b)))[0]
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_same_bits(y.to(x.device), expected)


@pytest.mark.small
def test_errors_name_both_values() -> None:
    x, w, b = draw(4, 64, (FP32, FP32))
    with pytest.raises(RuntimeError, match=r"weight has 63 elements, expected n = 64"):
        forward(x, w[:63], b)
    with pytest.raises(RuntimeError, match=r"weight has dtype BFloat16, x has Float"):
        forward(x, w.bfloat16(), b)
    with pytest.raises(RuntimeError, match=r"bias is on another device, x is on cuda:0"):
        forward(x, w, b.cpu())
    with pytest.raises(RuntimeError, match=r"strides \(1, 4\)"):
        forward(x.reshape(64, 4).t(), w, b)


def test_more_than_two_to_the_31_elements() -> None:
    n = 4096
    rows = 2**31 // n + 2
    if torch.cuda.mem_get_info()[0] < 3 * rows * n * 2:
        pytest.skip("needs 13 GB of GPU memory")
    x = torch.zeros(rows, n, dtype=BF16, device=DEVICE)
    x[-3:] = torch.randn(3, n)
    y, stats = forward(x)
    alone, alone_stats = forward(x[-3:].clone())
    assert_same_bits(y[-3:], alone)
    assert_same_bits(stats[:, -3:], alone_stats)
    assert y[:-3].abs().amax() == 0
