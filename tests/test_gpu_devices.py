"""What only a device can show, of every operation, forward and backward: CUDA graphs, streams, a second device, no
waiting, memory that runs out, more than 2^31 elements.

Each test has a form for the CPU too, which shows that what it expects is right: there a graph is a second call, a
stream is the only one, and little memory is that of the process.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Place, require
from torch import Tensor

import fused_norm
import fused_norm.functional as FF
from fused_norm.bench import add_norms, cases, losses
from fused_norm.bench.norms import EPS
from fused_norm.bench.operation import Inputs, as_tuple, gradients
from fused_norm.testing import relative_error

FP32, BF16 = torch.float32, torch.bfloat16

#: Relative L2 errors that tell right from wrong.
LIMITS = {FP32: 1e-5, BF16: 1e-2}

#: The operations of the benchmark, which has their inputs and truths, with and without dropout; dtypes by turns.
NORMS = ("layer_norm", "rms_norm")
ADD_NORMS = ("add_layer_norm", "add_rms_norm", "dropout_add_layer_norm", "dropout_add_rms_norm")
TICKS = ("ticks_cross_entropy", "softcap_ticks_cross_entropy", "linear_ticks_cross_entropy")
OPS = (*NORMS, *ADD_NORMS, *TICKS)
SHAPES = {"norms": (48, 640), "add-norms": (48, 640), "ticks": (48, 1000), "softcap": (48, 1000)}

GPU_PLACES = [Place("cuda", backend) for backend in ("triton", "native", "auto")]
PLACES = [pytest.param(p, id=str(p), marks=pytest.mark.gpu) for p in GPU_PLACES]
every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


@pytest.fixture(params=[pytest.param(Place("cpu", "native"), id="cpu-native"), *PLACES])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param.backend != "auto":
        require(request.param)
    with fused_norm.use_backend(request.param.backend):
        yield request.param


# ------------------------------------------------------------------------------------------------- operations and truth


def shape_of(op: str, rows: int | None = None) -> tuple[int, ...]:
    m, n = SHAPES[cases.OPS[op].group]
    return (rows or m, n, *([32] if op.startswith("linear") else []))


def draw(op: str, dtype: torch.dtype, device: str, seed: int = 0, shape: tuple[int, ...] | None = None) -> Inputs:
    return cases.OPS[op].make_inputs(shape or shape_of(op), dtype, torch.device(device), seed)


def function(op: str) -> Callable:
    """The operation of what the benchmark draws; a mask by torch's generator, as it is in training."""
    if op not in ADD_NORMS:
        return cases.OPS[op].fused
    return partial(add_norms.fused, op.endswith("rms_norm"), add_norms.DROPOUT_P if op.startswith("dropout") else 0.0)


def run(op: str, inputs: Inputs, call: Callable | None = None) -> dict[str, Tensor]:
    """Outputs and gradients, by name."""
    outputs = as_tuple((call or function(op))(*inputs.args))
    grads = gradients(outputs, inputs.leaf_tensors, inputs.upstream)
    names = (*cases.OPS[op].outputs, *(f"d{leaf}" for leaf in inputs.leaves))
    return dict(zip(names, (*(o.detach() for o in outputs), *grads), strict=True))


def mask_of(inputs: Inputs, results: dict[str, Tensor]) -> Tensor:
    """What was kept of x: where the sum is not the residual, or x has a gradient (a small x may be lost in the sum)."""
    return (results["summed"] != inputs.tensors["r"].detach()) | (results["dx"] != 0)


def check(op: str, inputs: Inputs, results: dict[str, Tensor]) -> None:
    """Hold results to the fp64 truth of these inputs, and of the mask that was drawn."""
    bench = cases.OPS[op]
    if bench.truth_of_call is None:
        truth = bench.truths[""](inputs)
    else:
        mask = mask_of(inputs, results).double() / (1 - add_norms.DROPOUT_P) if op.startswith("dropout") else None
        truth = bench.truth_of_call(inputs, lambda *args: (None, mask))
    assert truth.keys() >= results.keys()
    for name, value in results.items():
        assert relative_error(value, truth[name]) <= LIMITS[inputs.x.dtype], name


def fill(inputs: Inputs, others: Inputs) -> None:
    """Put other numbers where these are."""
    for mine, theirs in zip(
        (*inputs.args, *as_tuple(inputs.upstream)), (*others.args, *as_tuple(others.upstream)), strict=True
    ):
        if mine is not None:
            mine.detach().copy_(theirs.detach())


# --------------------------------------------------------------------------------------------------------------- graphs


def capture(
    step: Callable[[], dict[str, Tensor]], device: str, warm_up: Callable[[], object] | None = None
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """A function that does the step again as it was recorded, and the results, which it writes over.

    It is done beforehand too, if there is nothing else to ``warm_up``.
    """
    if device == "cpu":
        results = step()

        def replay() -> None:
            for name, value in step().items():
                results[name].copy_(value)

        return replay, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            (warm_up or step)()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


@every_dtype
@every_op
def test_a_graph_replays_forward_and_backward(op: str, dtype: torch.dtype, place: Place) -> None:
    inputs = draw(op, dtype, place.device)
    replay, results = capture(lambda: run(op, inputs), place.device)
    masks = []
    for seed in (1, 2):
        fill(inputs, draw(op, dtype, place.device, seed))
        for value in results.values():
            value.fill_(math.nan)
        replay()
        check(op, inputs, results)
        if op.startswith("dropout"):
            masks.append(mask_of(inputs, results))
    assert not masks or not torch.equal(*masks), "each replay draws a mask of its own"


#: Widths of each kind of native kernel: rows that a warp, a block and a cluster hold, odd ones, and vocabularies.
FIRST_CALLS = [(op, shape) for op in NORMS for shape in ((48, 640), (48, 650), (16, 5120), (8, 16384), (4, 65536))]
FIRST_CALLS += [(op, shape) for op in TICKS[:2] for shape in ((48, 1000), (48, 1001), (8, 50000))]


def capture_first_calls(device: str) -> None:
    """To be run in a new process: torch is ready for graphs, this package has done nothing yet."""

    def of_torch() -> None:
        x = torch.ones(4, 4, device=device, requires_grad=True)
        torch.autograd.grad(torch.nn.functional.layer_norm(x, (4,)).sin().sum(), x)

    for dtype, (op, shape) in itertools.product((FP32, BF16), FIRST_CALLS):
        inputs = draw(op, dtype, device, shape=shape)
        replay, results = capture(lambda: run(op, inputs), device, of_torch)  # noqa: B023
        fill(inputs, draw(op, dtype, device, 1, shape))
        for value in results.values():
            value.fill_(math.nan)
        replay()
        check(op, inputs, results)
        print(op, shape, dtype, flush=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_graph_records_the_very_first_call(device: str) -> None:
    """What native kernels ask of the device once, and allow them once, needs no call before the capture.

    (Triton's are compiled and loaded by their first call, which must come before.)
    """
    require(Place(device, "native"))
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(Path(fused_norm.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "FUSED_NORM_BACKEND": "native"}
    code = f"import test_gpu_devices; test_gpu_devices.capture_first_calls({device!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"after {done.stdout[-300:]}: {done.stderr[-3000:]}"
    assert len(done.stdout.splitlines()) == 2 * len(FIRST_CALLS), done.stdout


# -------------------------------------------------------------------------------------------------------------- waiting


@contextlib.contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    """What synchronises raises, and the device is still busy with what came before when all has been enqueued."""
    if device == "cpu":
        yield
        return
    busy = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not busy.query(), "someone has waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def module_of(op: str, inputs: Inputs) -> Callable:
    """The operation's module with the case's parameters, as a function of the same arguments."""
    x, w = inputs.x, inputs.tensors.get("w")
    options = {"device": x.device, "dtype": x.dtype}
    if op.startswith("linear"):
        module, taken, parameters = (
            fused_norm.LinearTicksCrossEntropyLoss(*w.T.shape, **options),
            (0, 2),
            ["linear.weight"],
        )
    elif op in TICKS:
        softcap = losses.SOFTCAP if op.startswith("softcap") else None
        module, taken, parameters = fused_norm.TicksCrossEntropyLoss(softcap=softcap), (0, 1), []
    else:
        rms = op.endswith("rms_norm")
        options["eps"], taken, parameters = EPS[rms], (0,), ["weight", "bias"][: 2 - rms]
        if op in ADD_NORMS:
            options["p"], taken = add_norms.DROPOUT_P if op.startswith("dropout") else 0.0, (0, 1)
        name = f"{'Add' if op in ADD_NORMS else ''}{'RMS' if rms else 'Layer'}Norm"
        module = getattr(fused_norm, name)(x.shape[-1], **options)
    values = [inputs.tensors[key] for key in ("w", "b")[: len(parameters)]]
    return lambda *args: torch.func.functional_call(
        module, dict(zip(parameters, values, strict=True)), tuple(args[i] for i in taken)
    )


@every_op
def test_nothing_waits_for_the_device(op: str, place: Place) -> None:
    inputs = draw(op, FP32, place.device)
    for call in (function(op), module_of(op, inputs)):
        for _ in range(2):
            run(op, inputs, call)  # compiles the kernels, and leaves memory to take
        with nothing_waits(place.device):
            results = run(op, inputs, call)
        check(op, inputs, results)


# ----------------------------------------------------------------------------------------------------- streams, devices


@every_op
def test_a_stream_that_is_not_the_default_one(op: str, place: Place) -> None:
    """Kernels wait for what their own stream still computes, in forward and in backward, and for nothing else's."""
    inputs, right = draw(op, FP32, place.device, 0), draw(op, FP32, place.device, 1)
    run(op, inputs)  # compiled beforehand: what compiles would also wait
    on_gpu = place.device != "cpu"
    stream = torch.cuda.Stream() if on_gpu else None
    if on_gpu:
        torch.cuda.synchronize()
    with torch.cuda.stream(stream) if on_gpu else nullcontext():
        if on_gpu:
            torch.cuda._sleep(50_000_000)  # a kernel on another stream would read the numbers of before
        fill(inputs, right)
        outputs = as_tuple(function(op)(*inputs.args))
    grads = gradients(outputs, inputs.leaf_tensors, inputs.upstream)  # backward takes forward's stream by itself
    if on_gpu:
        torch.cuda.current_stream().wait_stream(stream)
    names = (*cases.OPS[op].outputs, *(f"d{leaf}" for leaf in inputs.leaves))
    check(op, right, dict(zip(names, (*(o.detach() for o in outputs), *grads), strict=True)))


@every_op
@pytest.mark.parametrize(
    "where", ["cpu-native", *(pytest.param(f"cuda:1-{p.backend}", marks=pytest.mark.gpu) for p in GPU_PLACES)]
)
def test_a_device_that_is_not_the_current_one(op: str, where: str) -> None:
    """Kernels run where the tensors are, and leave the current device alone."""
    device, _, backend = where.partition("-")
    if device != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here")
    if backend != "auto":
        require(Place(device.partition(":")[0], backend))
    with fused_norm.use_backend(backend):
        inputs = draw(op, FP32, device)
        results = run(op, inputs)
        assert all(value.device == inputs.x.device for value in results.values())
        check(op, inputs, results)
        if device != "cpu":
            assert torch.cuda.current_device() == 0
            elsewhere = replace(inputs, tensors={**inputs.tensors, "x": inputs.x.detach().to("cuda:0")})
            with pytest.raises(RuntimeError):
                function(op)(*elsewhere.args)


# ---------------------------------------------------------------------------------------------------- too little memory


MIB = 1 << 20


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _free_in_the_heap() -> list[Tensor]:
    """All that the process holds without using it, which other tests left, in pieces down to 1 MiB; never touched."""
    pieces, size = [], 256 * MIB
    while size >= MIB:
        try:
            pieces.append(torch.empty(size, dtype=torch.uint8))
        except RuntimeError:
            size //= 2
    return pieces


@contextlib.contextmanager
def memory_left(device: str, allowed: int) -> Iterator[None]:
    """So many bytes may be allocated more, and no others."""
    gc.collect()
    if device == "cpu":
        before, taken = resource.getrlimit(resource.RLIMIT_AS), []
        try:
            resource.setrlimit(resource.RLIMIT_AS, (_address_space(), before[1]))
            taken.extend(_free_in_the_heap())
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + allowed, before[1]))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            taken.clear()
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + allowed) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device != "cpu" else 0


@every_op
def test_memory_that_runs_out_leaves_nothing_behind(op: str, place: Place) -> None:
    """Whatever allocation fails, of results or of what a kernel needs beside them: torch's own error, inputs as they
    were, no gradient, no memory kept; and with enough of it all is right."""
    columns = {"norms": 2048, "add-norms": 2048}.get(cases.OPS[op].group, 16384)
    rows = 64 * MIB // 4 // columns  # a size that glibc gives back to the system when it is freed
    shape = (rows, columns, *([128] if op.startswith("linear") else []))
    inputs = draw(op, FP32, place.device, shape=shape)
    kept = draw(op, FP32, place.device, shape=shape)
    run(op, draw(op, FP32, place.device))  # kernels and threads are there
    expected = run(op, inputs)
    call, stages, step = function(op), [], 48 * MIB

    def attempt(allowed: int) -> bool:
        before, stage = allocated(place.device), "forward"
        try:
            with memory_left(place.device, allowed):
                outputs = as_tuple(call(*inputs.args))
                stage = "backward"
                reached = [(o, u) for o, u in zip(outputs, as_tuple(inputs.upstream), strict=True) if u is not None]
                torch.autograd.backward(*zip(*reached, strict=True))
                return True
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if place.device != "cpu":
                # Before torch 2.13 an extension by the stable ABI never learns what went wrong.
                unnamed = place.backend == "native" and torch.__version__ < (2, 13)
                assert isinstance(error, RuntimeError if unnamed else torch.OutOfMemoryError), error
            stages.append(stage)
        outputs = None
        assert allocated(place.device) == before
        assert all(leaf.grad is None for leaf in inputs.leaf_tensors)
        for mine, theirs in zip(inputs.args, kept.args, strict=True):
            assert mine is None or torch.equal(mine, theirs)
        small = draw(op, FP32, place.device)
        check(op, small, run(op, small))
        return False

    for i in range(1, 100):
        if attempt(i * step):
            break
    else:
        pytest.fail("no amount of memory is enough")
    assert stages and stages == sorted(stages, reverse=True)  # forward's come first
    # The linear loss makes its gradients in forward, the others have no large result there.
    needs = {"forward"} if op.startswith("linear") else {"backward"} if op in TICKS else {"forward", "backward"}
    assert set(stages) == needs, stages
    for name in inputs.leaves:  # of a mask of its own with dropout
        assert op.startswith("dropout") or torch.equal(inputs.tensors[name].grad, expected[f"d{name}"]), name


# ---------------------------------------------------------------------------------------------- more than 2^31 elements


#: More elements than 2^31, of bf16; on a CPU some.
BEYOND = {"cuda": (1 << 31) + (1 << 20), "cpu": 1 << 19}
LAST = 3


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("dropout")])
def test_more_than_2_to_the_31_elements(op: str, place: Place) -> None:
    """The last rows, whose offsets no 32 bits hold, come out as they do alone: outputs, and the gradient of the input.

    (With dropout a row's mask depends on its place: test_triton_add_norm.py.)
    """
    norm, linear = op not in TICKS, op.startswith("linear")
    columns = 4096 if norm else 1 << (18 if place.device == "cuda" else 10)
    rows = BEYOND[place.device] // columns
    if place.device == "cuda":
        torch.cuda.empty_cache()
        need = (7 if op in ADD_NORMS else 5) * rows * columns * 2
        if not linear and torch.cuda.mem_get_info()[0] < need:
            pytest.skip(f"needs {need / 1e9:.0f} GB of GPU memory")
    few = draw(op, BF16, place.device, shape=(LAST, columns, *([16] if linear else [])))
    call = function(op)
    if not norm:
        loss = FF.linear_ticks_cross_entropy if linear else FF.ticks_cross_entropy
        call = partial(loss, reduction="none", softcap=losses.SOFTCAP if op.startswith("softcap") else None)

    def last_rows(m: int) -> list[Tensor]:
        """Of m rows, which are these again and again from the end; the upstream gradient is one row for all."""

        def rows_of(t: Tensor) -> Tensor:
            return t.detach().repeat(-(-m // LAST), *[1] * (t.dim() - 1))[-m:]

        tensors = {k: rows_of(t) if k in ("x", "r", "target") else t for k, t in few.tensors.items()}
        leaves = [tensors[k].requires_grad_() for k in ("x", "r") if k in tensors]
        y, *_ = outputs = as_tuple(call(*tensors.values()))
        upstream = few.upstream if op in NORMS else few.upstream[0] if norm else torch.ones(1, device=place.device)
        grads = torch.autograd.grad(y, leaves, upstream[-1:].expand(y.shape))
        return [t.detach()[-LAST:].clone() for t in (*outputs, *grads)]

    for found, expected in zip(last_rows(rows), last_rows(LAST), strict=True):
        if linear:  # a matrix product of other sizes sums in another order
            assert relative_error(found, expected) <= LIMITS[BF16]
        else:
            assert torch.equal(found, expected)
