"""fused_norm.kernel_layers: our norms by way of the kernels package, where transformers takes a version of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_norm
from fused_norm.kernel_layers import kernel_mapping

CONFIG = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}


def test_the_mapping_names_our_layer() -> None:
    mapping = kernel_mapping(["cpu", "cuda"])
    assert mapping.keys() == {"RMSNorm", "RMSNormZeroCentered"}
    for devices in mapping.values():
        assert devices.keys() == {"cpu", "cuda"}
        layer = devices["cpu"].load()
        assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
        assert devices["cpu"] == devices["cuda"] and hash(devices["cpu"]) == hash(devices["cuda"])


@pytest.mark.parametrize("family", ["Llama", "Olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_to_a_module_of_transformers(family: str, dtype: torch.dtype) -> None:
    """What kernelize does, by hand: two classes of one name there, which round differently in bf16."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**CONFIG))
    norm = copy.deepcopy(model.model.norm).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32))
    x = torch.randn(500, 32).to(dtype)
    patched = copy.deepcopy(norm)
    fused_norm.patch(patched)
    layer = kernel_mapping()["RMSNorm"]["cpu"].load()
    expected = norm(x)
    norm.forward = layer.forward.__get__(norm)
    assert torch.equal(norm(x), patched(x))
    torch.testing.assert_close(norm(x), expected)  # within rounding of its dtype


@pytest.mark.parametrize("family", ["Llama", "Olmo2"])
def test_kernelize(family: str, reference_calls) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.utils.is_kernels_available():
        pytest.skip("transformers finds no version of kernels that it takes")
    import kernels

    torch.manual_seed(0)
    stock = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**CONFIG)).eval()
    model = copy.deepcopy(stock)
    with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    ids = torch.randint(3, 99, (2, 10))
    results = [m(ids, labels=ids, use_cache=False) for m in (model, stock)]
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-5)
    for result in results:
        result.loss.backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    with fused_norm.use_backend("reference"):
        model(ids, use_cache=False)
    assert len(reference_calls.forward) == len(norms) >= 5
    report = fused_norm.patch(model)  # what kernelize replaced is left to it
    assert report.swapped == [] and len(report.left) == len(norms)
