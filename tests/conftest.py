"""Fixtures for every test: seeding, the places (device and backend) it runs in, and a spy on the reference backend."""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import random
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import fused_norm

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with no more than torch, triton and pytest runs the other tests
    hypothesis = None
    collect_ignore = ["test_properties.py"]

SEED_VARIABLE = "FUSED_NORM_TEST_SEED"  # replays a failure: the seed of every test of the run
REQUIRE_VARIABLE = (
    "FUSED_NORM_TEST_REQUIRE"  # "native,triton": a missing one of these fails the tests instead of skipping them
)

#: Where a test of the public functions runs. The triton backend on a CPU (the interpreter) has its kernel tests.
CPU_BACKENDS = ("native", "torch", "reference")
CUDA_BACKENDS = ("triton", "native", "torch", "reference")


def pytest_configure() -> None:
    # A shell starts what it puts in the background with SIGINT ignored, and children inherit that: tests that interrupt
    # one would wait in vain.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
    return int(i) - 1, int(n)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", type=_shard, help="of the tests the I-th part of N, by their names")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (shard := config.getoption("--shard")) is not None:
        i, n = shard
        others = {item for item in items if zlib.crc32(item.nodeid.encode()) % n != i}
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device here")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Ten thousand tests, and all the modules of torch, are no garbage: no collection needs to look at them again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions tell at the end of what was never freed


# ------------------------------------------------------------------------------------------------------------ seeding


def _seed_of(node: pytest.Item) -> int:
    return int(os.environ.get(SEED_VARIABLE) or zlib.crc32(node.nodeid.encode()))


def pytest_report_header() -> str | None:
    return None if hypothesis else "hypothesis is not installed: tests/test_properties.py is left out"


if hypothesis:
    # No database: what an earlier run found would come before what the seed finds. No deadline: machines are shared.
    hypothesis.settings.register_profile(
        "seeded",
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Each test draws the same numbers whether it runs alone, in a suite or in another order."""
    value = _seed_of(request.node)
    random.seed(value)
    torch.manual_seed(value)
    if hypothesis and hypothesis.is_hypothesis_test(function := request.function):
        hypothesis.seed(value)(getattr(function, "__func__", function))
    return value


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        command = f"{SEED_VARIABLE}={_seed_of(item)} python -m pytest '{item.nodeid}'"
        report.sections.append(("seed", f"replay with {command}"))


# ------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Place:
    """A device and a backend that serves it."""

    device: str
    backend: str

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}"

    @property
    def composes(self) -> bool:
        """Whether double backward and add_norm are torch's operations there, around kernels of the norms alone."""
        return (self.device, self.backend) == ("cuda", "native")


def _missing(place: Place) -> str | None:
    if place.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here"
    reason = fused_norm.available_backends()[place.backend]
    if reason is None and place.device == "cuda":
        # A backend may serve the CPU and not this device, or one direction only: a call by name says so.
        x = torch.ones(1, 4, device="cuda", requires_grad=True)
        try:
            with fused_norm.use_backend(place.backend):
                fused_norm.functional.layer_norm(x, (4,)).sum().backward()
        except RuntimeError as error:
            reason = str(error)
    return reason


def require(place: Place) -> None:
    """Skip the test where ``place`` is missing, or fail it where the environment says it must be there."""
    reason = _missing(place)
    if reason is None:
        return
    if place.backend in os.environ.get(REQUIRE_VARIABLE, "").split(","):
        pytest.fail(f"{place} is required here, but: {reason}")
    pytest.skip(f"{place}: {reason}")


PLACES = [pytest.param(Place("cpu", b), id=f"cpu-{b}") for b in CPU_BACKENDS]
if torch.cuda.is_available():  # two thousand skipped tests would tell no more than the few of @pytest.mark.gpu
    PLACES += [pytest.param(Place("cuda", b), id=f"cuda-{b}", marks=pytest.mark.gpu) for b in CUDA_BACKENDS]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Runs the test once on every device and backend, with that backend chosen by name."""
    require(request.param)
    with fused_norm.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test once on every kind of device, with the backend that ``auto`` takes there."""
    return request.param


# ------------------------------------------------------------------------------------------- uninitialised memory, spy


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """``torch.empty`` and its kind, in Python and C++, come filled with NaN: an element left unwritten shows."""
    algorithms, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(algorithms, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@dataclass
class Calls:
    """The arguments of each call that reached the reference backend, by name."""

    forward: list[SimpleNamespace] = field(default_factory=list)
    backward: list[SimpleNamespace] = field(default_factory=list)


@pytest.fixture
def reference_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Records every call of the reference backend: which backend served a call is seen by whether it is recorded."""
    calls = Calls()
    reference = fused_norm.reference

    def recorded(function, log):
        signature = inspect.signature(function)

        def call(*args, **kwargs):
            log.append(SimpleNamespace(**signature.bind(*args, **kwargs).arguments))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(reference, "norm_forward", recorded(reference.norm_forward, calls.forward))
    monkeypatch.setattr(reference, "norm_backward", recorded(reference.norm_backward, calls.backward))
    return calls
