"""The benchmark's adapters for other packages, which need GPUs and are not installed here: against stand-ins with their
signatures, which refuse other arguments than the real ones take."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from fused_norm.bench import gate, main
from fused_norm.bench.cases import GROUPS, OPS
from fused_norm.bench.operation import DTYPES
from fused_norm.bench.results import read

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

#: What each operation has for peers of other packages.
PEERS = [
    *((op, p) for op in GROUPS["norms"] for p in ("liger", "quack", "flash-attn", "apex", "transformer-engine")),
    *((op, "flash-attn") for op in GROUPS["add-norms"]),
    ("add_rms_norm", "liger"),
    ("add_rms_norm", "quack"),
    *(("ticks_cross_entropy", p) for p in ("ce:liger", "ce:quack", "ce:quack-inplace")),
    *(("linear_ticks_cross_entropy", p) for p in ("ce:liger", "ce:quack", "ce:cut", "ce:cut-exact", "ce:cut-compile")),
]
SHAPE = {2: (16, 24), 3: (16, 40, 24)}

#: Files by their place. ``answer.scale`` bends every output.
FAKES = {
    "answer.py": "scale = 1.0\n",
    "liger_kernel/ops/__init__.py": """
        import answer, torch
        import torch.nn.functional as F

        class LigerLayerNormFunction:
            @staticmethod
            def apply(X, W, B, eps):
                return F.layer_norm(X, W.shape, W, B, eps) * answer.scale

        class LigerRMSNormFunction:
            @staticmethod
            def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
                assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
                return F.rms_norm(X.float(), W.shape, W.float(), eps).to(X.dtype) * answer.scale

        class LigerFusedAddRMSNormFunction:
            @staticmethod
            def apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
                S = X + R
                return LigerRMSNormFunction.apply(S, W, eps, offset, casting_mode, in_place), S

        class LigerCrossEntropyFunction(torch.autograd.Function):
            @staticmethod
            def forward(ctx, _input, target, weight, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                        reduction="mean", softcap=None, return_z_loss=False, return_token_accuracy=False,
                        return_predicted_tokens=False):
                assert weight is None
                with torch.enable_grad():
                    leaf = _input.detach().clone().requires_grad_()
                    loss = F.cross_entropy(leaf.float(), target) * answer.scale
                if _input.requires_grad:
                    _input.detach().copy_(*torch.autograd.grad(loss, leaf))
                    ctx.save_for_backward(_input.detach())
                return loss.detach(), None, None, None

            @staticmethod
            def backward(ctx, grad_output, *others):
                return ctx.saved_tensors[0].mul_(grad_output), *[None] * 10

        class LigerFusedLinearCrossEntropyFunction:
            @staticmethod
            def apply(_input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
                assert _input.requires_grad or not torch.is_grad_enabled()
                assert torch.is_grad_enabled() or not _input.requires_grad, "would make the gradients"
                loss = F.cross_entropy(F.linear(_input, weight, bias).float(), target) * answer.scale
                return loss, None, None, None
    """,
    "quack/__init__.py": "",
    "quack/rmsnorm.py": """
        import answer, torch
        import torch.nn.functional as F

        def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6,
                    prenorm=False, weight_offset=0.0):
            assert bias is None and eps == 1e-6
            s = x if residual is None else x + residual
            y = F.rms_norm(s.float(), weight.shape, weight.float(), eps).to(x.dtype) * answer.scale
            return (y, s) if prenorm else y

        def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
            assert weight.dtype == bias.dtype == torch.float32 and eps == 1e-5
            y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
            y = y.to(x.dtype) * answer.scale
            more = (*[rstd.flatten()] * return_rstd, *[mean.flatten()] * return_mean)
            return (y, *more) if more else y

        def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
            xhat = (x.float() - mean[:, None]) * rstd[:, None]
            g = dout.float() * weight.float()
            dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
            dw = (dout.float() * xhat).sum(0).to(weight.dtype)
            return dx.to(x.dtype), dw, dout.float().sum(0).to(weight.dtype) if has_bias else None
    """,
    "quack/cross_entropy.py": """
        import answer, torch
        import torch.nn.functional as F

        class InPlace(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, target):
                ctx.save_for_backward(x, target)
                return F.cross_entropy(x.float(), target)

            @staticmethod
            def backward(ctx, dy):
                x, target = ctx.saved_tensors
                p = x.float().softmax(1)
                p[torch.arange(len(p)), target] -= 1
                return x.detach().copy_(p * dy / len(p)), None

        def cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean",
                          inplace_backward=False):
            assert lse_partial is None and weight is None and reduction == "mean"
            loss = InPlace.apply(x, target) if inplace_backward else F.cross_entropy(x.float(), target)
            return loss * answer.scale
    """,
    "quack/linear_cross_entropy.py": """
        import answer, torch
        import torch.nn.functional as F

        def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean",
                                         tuned=True, use_scaled_exp=None):
            assert x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] % 8 == 0 and chunk_size % 8 == 0
            return F.cross_entropy(F.linear(x, weight).float(), target) * answer.scale
    """,
    "flash_attn/__init__.py": "",
    "flash_attn/ops/__init__.py": "",
    "flash_attn/ops/triton/__init__.py": "",
    "flash_attn/ops/triton/layer_norm.py": """
        import answer, torch
        import torch.nn.functional as F

        prenorms = set()

        def layer_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,
                          rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False,
                          is_rms_norm=False, return_dropout_mask=False, out_dtype=None, out=None, residual_out=None):
            assert eps == (1e-6 if is_rms_norm else 1e-5) and x.shape[1] * x.element_size() <= 65536
            if x.requires_grad:
                prenorms.add(prenorm)
            x = F.dropout(x, dropout_p)
            s = x if residual is None else x + residual
            w = weight.float()
            if is_rms_norm:
                y = F.rms_norm(s.float(), w.shape, w, eps)
            else:
                y = F.layer_norm(s.float(), w.shape, w, bias.float(), eps)
            y = y.to(x.dtype) * answer.scale
            return (y, s) if prenorm else y

        def rms_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,
                        rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False,
                        return_dropout_mask=False, out_dtype=None, out=None, residual_out=None):
            assert bias is None
            return layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
                                 is_rms_norm=True)
    """,
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "fused_layer_norm_cuda.py": "",
    "apex/normalization/fused_layer_norm.py": """
        import answer
        import torch.nn.functional as F

        def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
            assert eps == 1e-5
            return F.layer_norm(input, normalized_shape, weight, bias, eps) * answer.scale

        def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
            assert eps == 1e-6
            y = F.rms_norm(input.double(), normalized_shape, weight.double(), eps)
            return y.to(input.dtype) * answer.scale
    """,
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch.py": """
        import answer, torch
        import torch.nn.functional as F

        class Fuser(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, module, *params):
                ctx.module, ctx.saved = module, (x, *params)
                return module.formula(x, *params)

            @staticmethod
            def backward(ctx, dy):
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_() for t in ctx.saved]
                    dx, *grads = torch.autograd.grad(ctx.module.formula(*leaves), leaves, dy)
                ctx.saved = None
                return dx, None, *grads

        class Norm(torch.nn.Module):
            def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None,
                         zero_centered_gamma=False, hidden_size=None, device=None, dtype=None):
                super().__init__()
                self.eps = eps
                for name in self.names:
                    value = torch.full((normalized_shape,), 7.0, device=device, dtype=dtype)
                    setattr(self, name, torch.nn.Parameter(value))

            def forward(self, input):
                return Fuser.apply(input, self, *self.parameters())

        class LayerNorm(Norm):
            names = ("weight", "bias")

            def formula(self, x, w, b):
                return F.layer_norm(x, w.shape, w, b, self.eps) * answer.scale

        class RMSNorm(Norm):
            names = ("weight",)

            def formula(self, x, w):
                return F.rms_norm(x.float(), w.shape, w.float(), self.eps).to(x.dtype) * answer.scale
    """,
    "cut_cross_entropy/__init__.py": """
        import answer, torch
        import torch.nn.functional as F

        impls = []

        def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
                                 filter_eps="high", impl="cce"):
            assert impl == "torch_compile" or e.dtype in (torch.bfloat16, torch.float16)
            impls.append((impl, filter_eps))
            assert torch.is_grad_enabled() or not e.requires_grad, "would keep what backward takes"
            return F.cross_entropy(F.linear(e, c).float(), targets) * answer.scale
    """,
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """The stand-ins, importable; gives the folder they are in."""
    folder = tmp_path / "fakes"
    for name, text in FAKES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    tops = {Path(name).parts[0].removesuffix(".py") for name in FAKES}
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]


def judge(op_name, peer, dtype, shape=None):
    op = OPS[op_name]
    inputs = op.make_inputs(shape or SHAPE[len(op.dims)], DTYPES[dtype], CPU)
    verdicts, calls = gate.judge(op, inputs, [op.providers["torch"], op.providers[peer]])
    assert verdicts["torch"].status == "ok"
    assert (peer in calls) == (verdicts[peer].status == "ok")
    return verdicts[peer]


def test_the_table_of_peers_is_whole():
    others = {(op.name, p.name) for op in OPS.values() for p in op.providers.values() if p.unavailable(CUDA)}
    ours_and_torchs = {"fused", "fused:triton", "fused:native", "fused:inplace", "ce:torch-linear", "ce:torch-chunked"}
    assert {pair for pair in others if pair[1] not in ours_and_torchs} == set(PEERS)
    assert all("is not installed" in OPS[op].providers[peer].unavailable(CUDA) for op, peer in PEERS)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("op", "peer"), PEERS)
def test_a_peer_is_called_as_it_should_be(fakes, op, peer, dtype):
    assert OPS[op].providers[peer].unavailable(CUDA) is None
    verdict = judge(op, peer, dtype)
    if dtype == "fp32" and peer in ("ce:cut", "ce:cut-exact") + ("ce:quack",) * op.startswith("linear"):
        assert (verdict.status, verdict.reason) == ("skipped", "takes bf16, fp16, the input is torch.float32")
    else:
        assert verdict.status == "ok", verdict.reason
        assert not verdict.no_backward
        gradients = {f"d{name}" for name in OPS[op].make_inputs(SHAPE[len(OPS[op].dims)], DTYPES[dtype], CPU).leaves}
        assert {"y", "y without grad", *gradients} <= verdict.errors.keys()


@pytest.mark.parametrize(("op", "peer"), PEERS)
def test_a_peer_that_is_off_is_shown_as_wrong(fakes, op, peer):
    importlib.import_module("answer").scale = 1.05
    verdict = judge(op, peer, "bf16")
    assert verdict.status == "wrong" and verdict.reason.startswith("y: error 0.0"), verdict


@pytest.mark.parametrize(("op", "peer"), PEERS)
def test_a_missing_function_or_a_broken_package_is_a_reason(fakes, op, peer):
    unavailable = OPS[op].providers[peer].unavailable
    assert unavailable(CPU) is None if peer == "ce:cut-compile" else "GPUs only" in unavailable(CPU)
    # What is in the modules that are called, each taken away in turn: at least one is missed, and it is named.
    missed = []
    for path in (path for path, text in FAKES.items() if "def " in text):
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        has = importlib.import_module(module)
        for name in [name for name in vars(has) if not name.startswith("_") and callable(getattr(has, name))]:
            kept = getattr(has, name)
            delattr(has, name)
            reason = unavailable(CUDA)
            setattr(has, name, kept)
            if reason is not None:
                assert f"has no {module}.{name}" in reason
                missed.append((path, name))
    assert missed and unavailable(CUDA) is None
    path = fakes / missed[0][0]
    path.write_text("raise OSError('libcudart.so.99: cannot open shared object file')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == Path(missed[0][0]).parts[0]]:
        del sys.modules[name]
    importlib.invalidate_caches()
    assert "fails: OSError: libcudart.so.99" in unavailable(CUDA)


def test_apex_without_its_extension_is_a_reason(fakes):
    (fakes / "fused_layer_norm_cuda.py").unlink()
    importlib.invalidate_caches()
    reason = OPS["layer_norm"].providers["apex"].unavailable(CUDA)
    assert "import fused_layer_norm_cuda fails: ModuleNotFoundError" in reason


@pytest.mark.parametrize(
    ("op", "peer", "dtype", "shape", "said"),
    [
        ("layer_norm", "liger", "fp64", (2, 8), "takes fp32, bf16, fp16, the input is torch.float64"),
        ("layer_norm", "liger", "fp32", (2, 65537), "takes up to 65536 columns, the input has 65537"),
        ("rms_norm", "flash-attn", "fp32", (2, 16385), "takes rows of up to 65536 bytes, the input's have 65540"),
        ("rms_norm", "flash-attn", "bf16", (2, 32769), "takes rows of up to 65536 bytes, the input's have 65538"),
        ("linear_ticks_cross_entropy", "ce:quack", "bf16", (16, 30, 24), "takes sizes that are multiples of 8, not 30"),
        ("linear_ticks_cross_entropy", "ce:quack", "bf16", (12, 32, 24), "takes sizes that are multiples of 8, not 12"),
    ],
)
def test_what_a_peer_does_not_take_is_skipped_with_the_reason(fakes, op, peer, dtype, shape, said):
    verdict = judge(op, peer, dtype, shape)
    assert (verdict.status, verdict.reason) == ("skipped", said)


def test_at_its_limit_a_peer_runs(fakes):
    assert judge("layer_norm", "liger", "fp32", (2, 65536)).status == "ok"
    assert judge("rms_norm", "flash-attn", "fp32", (2, 16384)).status == "ok"
    assert judge("layer_norm", "apex", "fp64").status == "ok"


def test_flash_attn_is_asked_for_the_sum_by_pre_norm_blocks_alone(fakes):
    module = importlib.import_module("flash_attn.ops.triton.layer_norm")
    for op, pre_norm in (("add_rms_norm", True), ("dropout_add_rms_norm", True), ("dropout_add_layer_norm", False)):
        module.prenorms.clear()
        verdict = judge(op, "flash-attn", "fp32")
        assert verdict.status == "ok" and ("summed" in verdict.errors) == pre_norm
        assert module.prenorms == {pre_norm}


def test_each_way_of_cut_cross_entropy(fakes):
    module = importlib.import_module("cut_cross_entropy")
    for peer, impl in (
        ("ce:cut", ("cce", "high")),
        ("ce:cut-exact", ("cce", None)),
        ("ce:cut-compile", ("torch_compile", "high")),
    ):
        module.impls.clear()
        judge("linear_ticks_cross_entropy", peer, "bf16")
        assert set(module.impls) == {impl}


@pytest.mark.parametrize("op", ["layer_norm", "add_rms_norm", "ticks_cross_entropy", "linear_ticks_cross_entropy"])
def test_a_whole_run_times_them(fakes, tmp_path, monkeypatch, op):
    peers = [peer for name, peer in PEERS if name == op]
    for peer in peers:
        provider = OPS[op].providers[peer]
        on_cpu = replace(provider, unavailable=lambda device, provider=provider: provider.unavailable(CUDA))
        monkeypatch.setitem(OPS[op].providers, peer, on_cpu)
    out = tmp_path / "run.jsonl"
    argv = ["--op", op, "--dtype", "bf16", "--shapes", "x".join(map(str, SHAPE[len(OPS[op].dims)]))]
    argv += ["--provider", ",".join(["torch", *peers]), "--device", "cpu", "--seconds", "2", "--output", str(out)]
    assert main(argv) == 0
    rows = {(r.provider, r.pass_name): r for r in read(out).rows}
    for peer in peers:
        for pass_name in OPS[op].passes:
            row = rows[peer, pass_name]
            if pass_name == "backward" and peer in ("transformer-engine", "ce:liger", "ce:quack-inplace"):
                assert row.status == "skipped" and "one graph has one backward" in row.reason
            else:
                assert row.status == "ok" and row.ms > 0, row


# -------------------------------------------------------------------------------------------------------------- shapes


def test_the_default_shapes_of_norms_on_a_cpu():
    text = "768x384 512x768 2048x1600 4096x1024 4096x4096 512x8192 8192x128 64x65536 1000x1001"
    expected = tuple(tuple(map(int, shape.split("x"))) for shape in text.split())
    for op in (op for op in OPS.values() if "norms" in op.group):
        assert op.shapes["cpu"] == expected


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_sweeps(op):
    assert set(op.sweeps) == {"models", "n", "m", "gpu"}
    for device in ("cpu", "cuda"):
        tables = [op.shapes, op.quick_shapes, *op.sweeps.values()]
        for table in tables:
            assert bool(table[device]) == (table is not op.sweeps["gpu"] or device == "cuda")
            assert len(set(table[device])) == len(table[device])
            assert all(len(shape) == len(op.dims) and min(shape) >= 1 for shape in table[device])
        by_n, by_m = op.sweeps["n"][device], op.sweeps["m"][device]
        assert len({m * n for m, n, *_ in by_n}) == 1 and len({shape[2:] for shape in by_n}) == 1
        assert [n for _, n, *_ in by_n] == sorted({n for _, n, *_ in by_n}) and by_n[-1][1] == 262144
        assert len({shape[1:] for shape in by_m}) == 1 and by_m[0][0] == 1 and len(by_m) > 5
        assert all(op.model_names(shape) for shape in op.sweeps["models"][device])


def test_the_vocabularies_and_widths_of_models():
    named = {v for _, v in OPS["ticks_cross_entropy"].sweeps["models"]["cuda"]}
    assert {30522, 32000, 50257, 128256, 262144} == named
    assert {768, 1024, 1600, 4096, 8192} <= {n for _, n in OPS["layer_norm"].sweeps["models"]["cpu"]}
    norm, loss, linear = (OPS[op] for op in ("add_rms_norm", "ticks_cross_entropy", "linear_ticks_cross_entropy"))
    assert norm.model_names((3, 1600)) == "GPT-2 XL" and loss.model_names((3, 1600)) == ""
    assert loss.model_names((3, 128256)) == "Llama-3 8B, Llama-3 70B" and norm.model_names((3, 128256)) == ""
    assert linear.model_names((3, 128256, 8192)) == "Llama-3 70B" and linear.model_names((3, 32000, 8192)) == ""
