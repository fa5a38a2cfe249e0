"""fused_norm.patch and unpatch: what is swapped, what is left and why, and that nothing else of the model changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits
from torch import nn

import fused_norm
from fused_norm import adapters


class CustomLayerNorm(nn.LayerNorm):
    """A subclass with a forward of its own: a swap would change what it computes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class PlainSubclass(nn.LayerNorm):
    """A subclass that changes nothing. Exact classes only are swapped all the same: its author may rely on the type."""


class HomeMadeRMSNorm(nn.Module):
    """A norm known only by its name."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


def _model() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        Block(nn.LayerNorm(16)),
        Block(nn.LayerNorm(16, eps=0.1, bias=False)),
        Block(nn.LayerNorm(16, elementwise_affine=False)),
        Block(CustomLayerNorm(16)),
        Block(PlainSubclass(16)),
        Block(HomeMadeRMSNorm(16)),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


EXACT = ["0.norm", "1.norm", "2.norm"]
OTHERS = ["3.norm", "4.norm", "5.norm"]


def _classes(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules()}


def test_exact_layer_norms_are_swapped_and_the_rest_reported() -> None:
    model = _model()
    before = _classes(model)
    report = fused_norm.patch(model)
    assert sorted(report.swapped) == EXACT
    assert sorted(report.left) == OTHERS
    for name, cls in _classes(model).items():
        assert cls is (fused_norm.LayerNorm if name in EXACT else before[name]), name


def test_the_report_reads_well() -> None:
    report = fused_norm.patch(_model())
    text = str(report)
    for name in EXACT + OTHERS:
        assert name in text
    for name, cls in zip(OTHERS, (CustomLayerNorm, PlainSubclass, HomeMadeRMSNorm), strict=True):
        assert isinstance(report.left[name], str) and len(report.left[name]) > 10
        assert cls.__name__ in report.left[name] or cls.__name__ in text
        assert report.left[name] in text


def test_a_model_without_norms() -> None:
    report = fused_norm.patch(nn.Linear(3, 3))
    assert report.swapped == report.residual == [] and report.left == report.residual_left == {} and str(report)


def test_exact_rms_norm_is_accounted_for() -> None:
    """Swapped or left with a reason, never passed over in silence; either way it computes the same."""
    model = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16))
    x = torch.randn(5, 16)
    expected = model(x)
    report = fused_norm.patch(model)
    assert ("1" in report.swapped) != ("1" in report.left)
    assert type(model[1]) is (fused_norm.RMSNorm if "1" in report.swapped else nn.RMSNorm)
    torch.testing.assert_close(model(x), expected)


def test_parameters_buffers_and_state_dict_are_the_same_objects() -> None:
    model = _model()
    parameters = dict(model.named_parameters())
    keys, values = list(model.state_dict()), [v.clone() for v in model.state_dict().values()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused_norm.patch(model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, p in model.named_parameters():
        assert p is parameters[name]
    assert list(model.state_dict()) == keys
    for a, b in zip(model.state_dict().values(), values, strict=True):
        assert_same_bits(a, b)
    model(torch.randn(4, 16)).square().sum().backward()
    before = model[0].norm.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].norm.weight, before)


def test_attributes_survive() -> None:
    model = _model()
    model[1].norm.weight.requires_grad_(False)
    model[2].eval()
    model[0].norm.note = "mine"
    fused_norm.patch(model)
    assert not model[1].norm.weight.requires_grad and model[1].norm.bias is None and model[1].norm.eps == 0.1
    assert not model[2].norm.training and model[1].norm.training
    assert model[2].norm.weight is None and not model[2].norm.elementwise_affine
    assert model[0].norm.note == "mine" and model[0].norm.normalized_shape == (16,)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_agree(training: bool) -> None:
    stock = _model().train(training)
    patched = copy.deepcopy(stock)
    fused_norm.patch(patched)
    x, dy = torch.randn(7, 16), torch.randn(7, 16)
    results = []
    for model in (patched, stock):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, *model.parameters()], dy)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_patched_model_runs_our_kernels(reference_calls) -> None:
    model = _model()
    fused_norm.patch(model)
    with fused_norm.use_backend("reference"):
        model(torch.randn(4, 16))
    assert len(reference_calls.forward) == len(EXACT)


def test_hooks_are_kept() -> None:
    model, seen = _model(), []
    norm = model[0].norm
    norm.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    handle = norm.register_forward_hook(lambda m, args, out: seen.append("forward"))
    norm.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    norm.weight.register_hook(lambda g: seen.append("weight"))
    fused_norm.patch(model)
    model(torch.randn(4, 16, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "weight"]
    handle.remove()
    seen.clear()
    model(torch.randn(4, 16))
    assert seen == ["pre"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_patched_model(copied) -> None:
    model = _model()
    x = torch.randn(4, 16)
    fused_norm.patch(model)
    clone = copied(model)
    assert _classes(clone) == _classes(model)
    assert_same_bits(clone(x).detach(), model(x).detach())
    with torch.no_grad():
        clone[0].norm.weight.add_(1)
    assert not torch.equal(clone[0].norm.weight, model[0].norm.weight)
    fused_norm.unpatch(clone)
    assert type(clone[0].norm) is nn.LayerNorm and type(model[0].norm) is fused_norm.LayerNorm


def test_unpatch_restores_it_all() -> None:
    model = _model()
    x = torch.randn(4, 16)
    before, expected, parameters = _classes(model), model(x), list(model.parameters())
    modules = dict(model.named_modules())
    attributes = {name: set(vars(m)) for name, m in modules.items()}
    fused_norm.patch(model)
    fused_norm.unpatch(model)
    assert _classes(model) == before
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert_same_bits(model(x).detach(), expected.detach())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert b"fused_norm" not in pickle.dumps(model)


def test_unpatch_of_a_stock_model_changes_nothing() -> None:
    model = _model()
    before = _classes(model)
    fused_norm.unpatch(model)
    assert _classes(model) == before


def test_unpatch_leaves_what_the_user_built() -> None:
    model = nn.Sequential(fused_norm.LayerNorm(16), nn.LayerNorm(16))
    assert fused_norm.patch(model).swapped == ["1"]
    fused_norm.unpatch(model)
    assert type(model[0]) is fused_norm.LayerNorm and type(model[1]) is nn.LayerNorm


def test_patch_takes_modules_only() -> None:
    for function in (fused_norm.patch, fused_norm.unpatch):
        with pytest.raises(TypeError, match="list"):
            function([nn.LayerNorm(16)])


def test_patch_twice() -> None:
    model = _model()
    fused_norm.patch(model)
    classes = _classes(model)
    again = fused_norm.patch(model)
    assert again.swapped == [] and set(OTHERS) <= set(again.left) <= set(OTHERS + EXACT)
    assert _classes(model) == classes
    fused_norm.unpatch(model)
    assert type(model[0].norm) is nn.LayerNorm


def test_a_shared_module_stays_shared() -> None:
    norm = nn.LayerNorm(16)
    model = nn.Sequential(norm, nn.Linear(16, 16), norm)
    report = fused_norm.patch(model)
    assert model[0] is model[2] and type(model[0]) is fused_norm.LayerNorm
    assert "0" in report.swapped
    fused_norm.unpatch(model)
    assert model[0] is model[2] and type(model[0]) is nn.LayerNorm


def test_the_root_itself_is_a_norm() -> None:
    norm = nn.LayerNorm(16)
    x = torch.randn(4, 16)
    expected = norm(x)
    report = fused_norm.patch(norm)
    assert len(report.swapped) == 1 and type(norm) is fused_norm.LayerNorm, "the caller's own reference must be patched"
    torch.testing.assert_close(norm(x), expected)
    fused_norm.unpatch(norm)
    assert type(norm) is nn.LayerNorm


def test_a_norm_that_other_code_already_holds() -> None:
    """A list or an attribute outside the module tree points at the same module after the swap."""
    model = _model()
    held = model[0].norm
    fused_norm.patch(model)
    assert held is model[0].norm


def test_checkpoints_move_between_stock_and_patched() -> None:
    stock, patched = _model(), _model()
    fused_norm.patch(patched)
    with torch.no_grad():
        for p in stock.parameters():
            p.normal_()
    patched.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(4, 16)
    torch.testing.assert_close(patched(x), stock(x), rtol=1e-4, atol=1e-5)
    _model().load_state_dict(patched.state_dict(), strict=True)


# torch's own layers, whose eval mode may run a kernel for the whole layer, which calls no norm


def _torch_transformer(**options) -> nn.Transformer:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 32, **{"dropout": 0.0, "batch_first": True, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def _source_target_masks() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    masks = {
        "src_key_padding_mask": torch.arange(5) >= torch.tensor([[5], [5], [3]]),
        "memory_key_padding_mask": torch.arange(5) >= torch.tensor([[5], [4], [3]]),
        "tgt_key_padding_mask": torch.arange(4) >= torch.tensor([[4], [3], [4]]),
        "tgt_mask": torch.ones(4, 4, dtype=torch.bool).triu(1),
    }
    return torch.randn(3, 5, 16), torch.randn(3, 4, 16), masks


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_transformer(norm_first: bool, bias: bool, masked: bool) -> None:
    stock = _torch_transformer(norm_first=norm_first, bias=bias)
    patched = copy.deepcopy(stock)
    report = fused_norm.patch(patched)
    assert len(report.swapped) == 12 and len(report.residual) == 4 and not report.left and not report.residual_left
    source, target, masks = _source_target_masks()
    masks = masks if masked else {"tgt_is_causal": True, "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4)}
    for training in (True, False):
        results = []
        for model in (patched.train(training), stock.train(training)):
            leaves = source.clone().requires_grad_(), target.clone().requires_grad_()
            y = model(*leaves, **masks)
            results.append((y, *torch.autograd.grad(y.square().sum(), [*leaves, *model.parameters()])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    classes = {type(m) for m in stock.modules()}
    fused_norm.unpatch(patched)
    assert {type(m) for m in patched.modules()} == classes


def test_torch_encoder_layer_keeps_its_kernel(monkeypatch) -> None:
    """In eval mode without gradients the stock kernel runs, and in training the fused addition."""
    model = _torch_transformer().encoder
    source = torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = model.eval()(source)
    fused_norm.patch(model)
    calls = []
    for owner, name in ((torch, "_transformer_encoder_layer_fwd"), (fused_norm.functional, "add_layer_norm")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=original, _n=name, **k: calls.append(_n) or _f(*a, **k))
    with torch.no_grad():
        torch.testing.assert_close(model(source), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["_transformer_encoder_layer_fwd"] * 2
    calls.clear()
    model.train()(source)
    assert calls == ["add_layer_norm"] * 4


def test_torch_transformer_dropout() -> None:
    """The same spread over seeds, and for one seed the same result."""
    stock = _torch_transformer(dropout=0.2).train()
    patched = copy.deepcopy(stock)
    fused_norm.patch(patched)
    source, target, _ = _source_target_masks()
    samples = []
    with torch.no_grad():
        for model in (patched, stock):
            values = []
            for seed in range(200):
                torch.manual_seed(seed)
                values.append(model(source, target).square().mean(dim=(0, 1)))
            samples.append(torch.stack(values).double())
        torch.manual_seed(7)
        first = patched(source, target)
        torch.manual_seed(7)
        assert_same_bits(patched(source, target), first)
    ours, theirs = samples
    error = (ours.var(0) / 200 + theirs.var(0) / 200).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.5 * error).all()
    assert ((ours.std(0) / theirs.std(0)).log().abs() < 0.3).all()  # 200 samples: 5 % each


def test_a_subclass_of_a_torch_layer_is_left() -> None:
    class Loud(nn.TransformerEncoderLayer):
        def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
            return super()._ff_block(x) * 2

    report = fused_norm.patch(nn.Sequential(Loud(16, 2, 32)))
    assert len(report.swapped) == 2 and report.residual == []
    assert "Loud is a subclass of TransformerEncoderLayer" in report.residual_left["0"]
    assert "Loud" in str(report)


# timm's norms: their forwards as timm 1.0 has them


def fast_layer_norm(*args):
    raise AssertionError("timm has a function here that a user turns on")


class _TimmLayerNorm(nn.LayerNorm):
    _fast_norm = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._fast_norm:
            x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x


class _TimmLayerNorm2d(nn.LayerNorm):
    _fast_norm = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        if self._fast_norm:
            x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        x = x.permute(0, 3, 1, 2)
        return x


@pytest.mark.parametrize("stock", [_TimmLayerNorm, _TimmLayerNorm2d])
def test_norms_of_timm(stock: type, monkeypatch, reference_calls) -> None:
    x = torch.randn((2, 16, 3, 5) if stock is _TimmLayerNorm2d else (2, 5, 16), requires_grad=True)
    norm = stock(16)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    assert fused_norm.patch(norm).swapped == [], "not timm's own"
    expected = norm(x)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [x, *norm.parameters()], dy)
    monkeypatch.setattr(stock, "__module__", "timm.layers.norm")
    norm.__class__ = timms = type(stock.__name__, (nn.LayerNorm,), dict(vars(stock)))  # not seen by patch before
    assert fused_norm.patch(norm).swapped == ["(the model itself)"]
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(norm(x), [x, *norm.parameters()], dy), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with fused_norm.use_backend("reference"):
        norm(x)
    assert len(reference_calls.forward) == 1
    norm._fast_norm = True
    with pytest.raises(AssertionError, match="turns on"):
        norm(x)
    assert fused_norm.unpatch(norm) and type(norm) is timms


def test_timm_models() -> None:
    timm = pytest.importorskip("timm", reason="timm, or its torchvision, is not installed", exc_type=ImportError)
    for name, norms, blocks in (("vit_tiny_patch16_224", 25, 12), ("convnext_atto", 17, 0)):
        torch.manual_seed(0)
        stock = timm.create_model(name, pretrained=False).eval()
        patched = copy.deepcopy(stock)
        report = fused_norm.patch(patched)
        assert (len(report.swapped), len(report.residual), report.left) == (norms, blocks, {})
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(patched(x), stock(x), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def test_bert(bert) -> None:
    stock, patched = copy.deepcopy(bert), copy.deepcopy(bert)
    report = fused_norm.patch(patched)
    norms = [name for name, m in stock.named_modules() if type(m) is nn.LayerNorm]
    assert sorted(report.swapped) == sorted(norms) and len(norms) == 5 and not report.left
    tokens, labels = torch.randint(99, (3, 12)), torch.tensor([0, 1, 1])
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    results = []
    for model in (patched, stock):
        out = model(input_ids=tokens, attention_mask=mask, labels=labels)
        out.loss.backward()
        results.append((out.logits, out.loss, *(p.grad for p in model.parameters() if p.grad is not None)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bert_save_and_load(bert, tmp_path) -> None:
    model = copy.deepcopy(bert)
    fused_norm.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(m, fused_norm.LayerNorm) for m in loaded.modules())
    for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert_same_bits(a, b)


def test_bert_parameters_without_weight_decay(bert) -> None:
    """Hugging Face finds norm parameters by the class: patched or not, the same ones decay."""
    from transformers.trainer_pt_utils import get_parameter_names

    patched = copy.deepcopy(bert)
    fused_norm.patch(patched)
    assert get_parameter_names(patched, [nn.LayerNorm]) == get_parameter_names(bert, [nn.LayerNorm])


def test_a_class_changed_after_patch_stays() -> None:
    """parametrize (and FSDP2) swap the class too: giving back another under it would lose the parameter."""
    model = nn.Sequential(nn.LayerNorm(8))
    fused_norm.patch(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert fused_norm.unpatch(model) == []
    model(torch.randn(2, 8))
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert fused_norm.unpatch(model) == ["0"] and type(model[0]) is nn.LayerNorm


def test_a_patched_model_can_be_traced() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    expected = model(x)
    fused_norm.patch(model)
    traced = torch.jit.trace(model, torch.randn(2, 8))
    assert "fused_norm::" not in str(traced.inlined_graph)  # it runs where this package is not
    torch.testing.assert_close(traced(x), expected)


def test_blocks_keep_the_options_of_a_norm_that_a_user_built() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).double()
    with torch.no_grad():
        layer.norm1.weight.sub_(1.0)
    layer.norm1.__class__ = fused_norm.LayerNorm
    layer.norm1.weight_offset = 1.0
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    expected = layer(x)
    assert fused_norm.patch(layer).residual == ["(the model itself)"]
    torch.testing.assert_close(layer(x), expected)
    layer.norm1.weight_offset = 0.0
    assert not torch.allclose(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_keep_the_order_of_an_rms_norm(dtype: torch.dtype) -> None:
    norm = fused_norm.RMSNorm(64, cast_before_weight=True).to(dtype)
    with torch.no_grad():
        norm.weight.add_(torch.randn(64) * 0.3)
    x, r = (torch.randn(9, 64).to(dtype) for _ in range(2))
    y, summed = adapters.add_norm(norm, x, r)
    assert torch.equal(y, norm(x + r)) and torch.equal(summed, x + r)


def test_unpatch_leaves_what_has_a_forward_of_its_own() -> None:
    """It may hold the fused class's, as accelerate's hooks do."""
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    fused_norm.patch(model)
    fused = model[0].forward
    model[0].forward = lambda x: fused(x)
    assert fused_norm.unpatch(model) == ["1"]
    assert model(torch.randn(2, 8)).shape == (2, 8)
    model[0].forward = fused  # as accelerate leaves it when its hook goes
    assert fused_norm.unpatch(model) == ["0"] and type(model[0]) is nn.LayerNorm and "forward" not in vars(model[0])


def test_nested_tensors_are_added_and_normalised_apart() -> None:
    norm = fused_norm.LayerNorm(8)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    y, summed = adapters.add_norm(norm, nested, nested)
    for a, e in zip(y.unbind(), norm(summed).unbind(), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(protocol: int) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    fused_norm.patch(layer)
    again = pickle.loads(pickle.dumps(layer, protocol))
    assert type(again) is type(layer)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(again(x), layer(x))


@pytest.mark.parametrize("cls", [fused_norm.AddLayerNorm, fused_norm.AddRMSNorm])
def test_add_norms_refuse_an_option_that_they_have_not(cls: type) -> None:
    with pytest.raises(TypeError, match="memory_efficient"):
        cls(8, memory_efficient=True)
