"""What the tests of the Triton kernels share: where the kernels run, what they load and store, what they compile to.

The kernels run on the GPU where there is one, else on the CPU in Triton's interpreter. That is chosen by
TRITON_INTERPRET=1 before triton is first imported, which is too late here (torch.compile's tests may have imported it):
tests marked ``@runs_kernels`` then run in one child process a module, and each of them reports what became of it there.
A test module imports ``runs_kernels`` with the fixtures ``remember_selected``, ``remember_places``,
``interpreter_as_hardware`` and ``launches_made_anew``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fused_norm.backends import triton as backend
from fused_norm.backends.triton import common

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else next((d for d in ("cuda", "xpu") if getattr(torch, d).is_available()), "cpu")
RUNS_HERE = backend.unavailable(DEVICE) is None

# -------------------------------------------------------------------------------------- the interpreter's child process

_selected: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def remember_selected(request: pytest.FixtureRequest) -> None:
    _selected[:] = [item.nodeid for item in request.session.items if item.path == request.path]


@functools.cache
def _outcomes_in_interpreter(tmp_path: Path, root: Path) -> dict[str, ElementTree.Element]:
    """Runs the selected tests of the module under the interpreter; the JUnit record of each, by its name."""
    report = tmp_path / "interpreter.xml"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *_selected]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not report.exists():
        pytest.fail(f"the interpreter's tests did not run:\n{run.stdout[-4000:]}{run.stderr[-4000:]}")
    return {case.attrib["name"]: case for case in ElementTree.parse(report).iter("testcase")}


def runs_kernels(test: Callable) -> Callable:
    """Run the test in the interpreter's process where the kernels cannot run in this one. On CUDA it is marked gpu."""
    if RUNS_HERE:
        return pytest.mark.gpu(test) if DEVICE == "cuda" else test

    # The marks and the parameters stay, the body goes.
    @functools.wraps(test)
    def outcome(*args, **kwargs) -> None:
        name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].rpartition(" (")[0]
        case = _outcomes_in_interpreter(*_places)[name]
        for child in case:
            if child.tag == "skipped":
                pytest.skip(child.attrib.get("message", ""))
            if child.tag in ("failure", "error"):
                pytest.fail(f"in the interpreter's process:\n{child.text}", pytrace=False)

    return outcome


_places: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def remember_places(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> None:
    _places[:] = [tmp_path_factory.mktemp("interpreter"), pytestconfig.rootpath]


@pytest.fixture(autouse=True, scope="module")
def interpreter_as_hardware() -> Iterator[None]:
    """The interpreter truncates fp32 to bf16 where hardware rounds to nearest: give it the hardware's conversion.

    Also spare it what took half of these tests' time: to patch the language anew at every call, to make a table of
    dtypes for each number, and to see whether integers overflow without telling (test_sanitized.py lets it tell). And
    let the interpreter of triton 3.6 loop over a range of tensors under NumPy 2.4.
    """
    if not (INTERPRETED and RUNS_HERE):
        yield
        return
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    cast_impl = interpreter.InterpreterBuilder.cast_impl
    patch_tensor, patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
    np_dtype, options = interpreter._get_np_dtype, interpreter.interpreter_builder.options
    np_dtype_of_numbers = functools.cache(np_dtype)
    scopes: dict = {}  # by the globals that say which of the language's modules a function sees

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(numpy.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(numpy.uint16).reshape(src.data.shape), dst_type.scalar)

    def patch_tensor_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patch_once(fn):
        if id(fn.__globals__) not in scopes:
            scopes[id(fn.__globals__)] = patch_lang(fn)
        return interpreter._LangPatchScope()  # of nothing

    def np_dtype_cached(ty):
        return np_dtype(ty) if ty.scalar.is_ptr() else np_dtype_of_numbers(ty.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_with_index)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_get_np_dtype", np_dtype_cached)
        patch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
        yield
    for scope in reversed(scopes.values()):
        scope.restore()


@pytest.fixture(autouse=True)
def launches_made_anew() -> None:
    """Tests that change what launch.py says must not find launches that were made before, nor leave theirs."""
    common.forget_launches()


def laid_out(t: Tensor, layout: str, padding: int) -> Tensor:
    """The same numbers on the device with another row stride or another alignment."""
    rows, n = t.shape
    if layout == "strided":
        wide = torch.full((rows, n + padding), float("nan"), dtype=t.dtype, device=DEVICE)
        wide[:, :n] = t
        return wide[:, :n]
    if layout == "misaligned":
        flat = torch.full((rows * n + 1,), float("nan"), dtype=t.dtype, device=DEVICE)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(rows, n)
    return t.to(DEVICE)


# -------------------------------------------------------------------------------------------------------------- traffic


class Traffic:
    """Bytes that kernels load from and store to each tensor's storage, counted in the interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self._accesses: list[tuple[str, object, object, int]] = []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, ptrs, mask, *args, **kwargs):
            result = load(builder, ptrs, mask, *args, **kwargs)
            self._accesses.append(("load", ptrs.data, mask.data, result.data.itemsize))
            return result

        def counted_store(builder, ptrs, value, mask, *args, **kwargs):
            self._accesses.append(("store", ptrs.data, mask.data, value.data.itemsize))
            return store(builder, ptrs, value, mask, *args, **kwargs)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def clear(self) -> None:
        self._accesses.clear()

    def total(self, kind: str) -> int:
        return sum(int(mask.sum()) * size for k, _, mask, size in self._accesses if k == kind)

    def of(self, kind: str, t: Tensor) -> int:
        begin = t.untyped_storage().data_ptr()
        end = begin + t.untyped_storage().nbytes()
        return sum(
            int((mask & (ptrs >= begin) & (ptrs < end)).sum()) * size
            for k, ptrs, mask, size in self._accesses
            if k == kind
        )


# ------------------------------------------------------------------------------------------------ compiled, without GPU

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def in_turn(builds: list) -> list[tuple]:
    """(target, build) of every build for one of the targets. All for all would take minutes; of what matters most the
    static report has them (bench/static.py), and tests/test_static.py holds it to these sources."""
    return list(zip(itertools.cycle(TARGETS), builds, strict=False))


#: Bytes of shared memory of a multiprocessor, as torch tells them (0: launch.py takes none of it for granted).
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
ELEMENT = {8: "fp64", 4: "fp32", 2: "bf16"}
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")


def nvidia_tool(name: str, argument: str, cubin: bytes, tmp_path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not tool.exists():
        pytest.skip(f"this triton brings no {name}")
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    return subprocess.run(
        [tool, argument, tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout


def assert_no_spills(kernel, target: str, tmp_path: Path, stack_limit: int = 0) -> None:
    if target == "gfx942":
        assembly = kernel.asm["amdgcn"]
        assert re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size): *(\d+)", assembly) == ["0"] * 3
        return
    usage = nvidia_tool("cuobjdump", "-res-usage", kernel.asm["cubin"], tmp_path)
    stack, local = map(int, re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage).groups())
    assert stack <= stack_limit and local == 0, usage


def widest_access(ptx: str, kind: str, bits: int) -> int:
    """Bytes of the widest ``ld.global`` or ``st.global`` of elements or words of ``bits``."""
    widths = re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.b{bits}\b", ptx)
    return max((int(w or 1) * bits // 8 for w in widths), default=0)


def streams(ptx: str) -> list[int]:
    """The bytes of each access to a stream: loads and copies to shared memory with an eviction hint.

    Some versions of Triton (3.7) drop a copy's hint. Then those past the first cache count, which are 16 bytes wide, or
    where there are none all of them.
    """
    loads = re.findall(r"ld\.global\.L1::evict_first\S*?(?:\.v(\d))?\.[bfu](\d+)\b", ptx)
    widths = [int(vector or 1) * int(bits) // 8 for vector, bits in loads]
    copies = re.findall(r"cp\.async\.(c[ag])\S*?(cache_hint)? \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    hinted = [int(width, 0) for _, hint, width in copies if hint]
    past_first = [int(width, 0) for kind, _, width in copies if kind == "cg"]
    return widths + (hinted or past_first or [int(width, 0) for _, _, width in copies])


def reductions(kernel) -> list[str]:
    """The type of what each reduction takes, layout included: the layout decides the order of the sum."""
    ttgir = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    types = re.findall(r'"tt\.reduce"\(.*?\}\) : \((.*?)\) ->', ttgir, re.DOTALL)
    return [re.sub(r"#\w+", lambda m: layouts.get(m[0], m[0]), t) for t in types]


def assert_64_bit_offsets(ttir: str) -> None:
    """Every product of two run-time integers has 64 bits: 32 do only where one factor is a constant of the tile."""
    products = re.findall(r"arith\.muli (\S+), (\S+) : (?:tensor<\S*x)?(i\d+)", ttir)
    narrow = [p for p in products if p[2] != "i64" and not any(factor.startswith("%c") for factor in p[:2])]
    assert any(p[2] == "i64" for p in products) and not narrow, narrow


# ------------------------------------------------------------------------------------------- a driver without a GPU


class _Driver:
    """A GPU that is always there. ``None`` is the index of the CPU's tensors, which stand for a device's."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        driver = self

        class Launcher:
            def __init__(self, src, metadata) -> None:
                self.src = src

            def __call__(self, *args) -> None:
                driver.launched.append((self.src.fn, args))

        class Utilities:
            load_binary = staticmethod(lambda *_: (1, 2, 0, 0, 1024))
            unload_module = staticmethod(lambda *_: None)
            get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448})

        self.launcher_cls, self.utils = Launcher, Utilities

    def get_current_device(self) -> None:
        return None

    def get_current_stream(self, device: object) -> int:
        return 77

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def launches_written_down() -> Iterator[list[tuple]]:
    """Under a driver that launches nothing: (kernel, arguments of its launcher) of every launch, in order. Kernels are
    really compiled, for sm_90."""
    from triton.compiler import compiler
    from triton.runtime import driver

    stand_in = _Driver()
    before, shared = driver._active, compiler.max_shared_mem
    compiler.max_shared_mem = lambda _: 232448
    driver.set_active(stand_in)
    common.forget_launches()
    try:
        yield stand_in.launched
    finally:
        common.forget_launches()
        for kernel in {id(k): k for k, _ in stand_in.launched}.values():
            kernel.device_caches.clear()
        gc.collect()  # a compiled kernel asks its driver to unload it
        driver._active, compiler.max_shared_mem = before, shared
