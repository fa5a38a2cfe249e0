"""fused_norm.patch on whole models of transformers: tiny, randomly initialised, nothing downloaded.

FAMILIES says for each what patch must find: a table that silently stopped matching fails here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fused_norm
from fused_norm import adapters

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
logging.getLogger("transformers").setLevel(logging.ERROR)  # token ids of the real vocabulary, kernels not installed


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TEXT, "num_key_value_heads": 2}
GEMMA = {**DECODER, "head_dim": 8}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WHISPER = {name: value for name, value in SEQ2SEQ.items() if name != "max_position_embeddings"}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
DELTA = {  # layers of linear attention, which have a gated norm of their own
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}

# name: (class, options of its config, norms swapped, residual blocks swapped)
FAMILIES: dict[str, tuple[str, dict, int, int]] = {
    "bert": ("BertModel", TEXT, 5, 5),
    "roberta": ("RobertaModel", TEXT, 5, 5),
    "xlm_roberta": ("XLMRobertaModel", TEXT, 5, 5),
    "camembert": ("CamembertModel", TEXT, 5, 5),
    "electra": ("ElectraModel", TEXT, 5, 5),
    "ernie": ("ErnieModel", TEXT, 5, 4),
    "rembert": ("RemBertModel", TEXT, 5, 4),
    "mpnet": ("MPNetModel", TEXT, 5, 5),
    "layoutlm": ("LayoutLMModel", TEXT, 5, 5),
    "deberta": ("DebertaModel", TEXT, 5, 4),
    "deberta_v2": ("DebertaV2Model", TEXT, 5, 4),
    "convbert": ("ConvBertModel", TEXT, 5, 5),
    "roformer": ("RoFormerModel", TEXT, 5, 5),
    "splinter": ("SplinterModel", TEXT, 5, 4),
    "albert": ("AlbertModel", {**TEXT, "embedding_size": 16}, 3, 3),
    "distilbert": (
        "DistilBertModel",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        5,
        3,
    ),
    "modernbert": ("ModernBertModel", TEXT, 5, 2),
    "xlnet": ("XLNetModel", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, 4, 2),
    "llama": ("LlamaForCausalLM", DECODER, 5, 2),
    "mistral": ("MistralForCausalLM", DECODER, 5, 2),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}, 5, 2),
    "qwen2": ("Qwen2ForCausalLM", DECODER, 5, 2),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}, 9, 2),
    "gemma": ("GemmaForCausalLM", GEMMA, 5, 2),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "sliding_window": 16}, 9, 2),
    "gemma3": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 16}, 13, 2),
    "olmo": ("OlmoForCausalLM", DECODER, 5, 2),
    "olmo2": ("Olmo2ForCausalLM", DECODER, 9, 0),
    "cohere": ("CohereForCausalLM", {**DECODER, "use_qk_norm": True}, 7, 0),
    "cohere2": ("Cohere2ForCausalLM", DECODER, 3, 0),
    "nemotron": ("NemotronForCausalLM", DECODER, 5, 2),
    "granite": ("GraniteForCausalLM", {**DECODER, "residual_multiplier": 0.5}, 5, 2),
    "smollm3": ("SmolLM3ForCausalLM", DECODER, 5, 2),
    "phi": ("PhiForCausalLM", TEXT, 3, 0),
    "phi3": ("Phi3ForCausalLM", DECODER, 5, 2),
    "stablelm": ("StableLmForCausalLM", DECODER, 5, 2),
    "stablelm_parallel": ("StableLmForCausalLM", {**DECODER, "use_parallel_residual": True}, 3, 0),
    "starcoder2": ("Starcoder2ForCausalLM", DECODER, 5, 2),
    "helium": ("HeliumForCausalLM", {**DECODER, "head_dim": 8}, 5, 2),
    "nanochat": ("NanoChatForCausalLM", DECODER, 9, 2),
    "persimmon": ("PersimmonForCausalLM", TEXT, 9, 2),
    "gpt_neox": ("GPTNeoXForCausalLM", {**TEXT, "use_parallel_residual": False}, 5, 2),
    "gpt_neox_parallel": ("GPTNeoXForCausalLM", TEXT, 5, 2),
    "gpt_oss": ("GptOssForCausalLM", {**GEMMA, "num_local_experts": 4, "num_experts_per_tok": 2}, 5, 2),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {**GEMMA, **DELTA, **EXPERTS, "num_experts": 2, "shared_expert_intermediate_size": 16},
        7,
        2,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        5,
        2,
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        5,
        2,
    ),
    "opt": ("OPTForCausalLM", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}, 5, 2),
    "opt_post": (
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        4,
        2,
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 6, 0),
    "falcon": ("FalconForCausalLM", TEXT, 3, 0),
    "mamba": ("MambaForCausalLM", {**TEXT, "state_size": 4}, 3, 0),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **DECODER,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        9,
        2,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        12,
        0,
    ),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ, 12, 4),
    "mbart": ("MBartForConditionalGeneration", SEQ2SEQ, 14, 4),
    "pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ, 12, 4),
    "marian": ("MarianMTModel", SEQ2SEQ, 10, 4),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**WHISPER, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
        12,
        4,
    ),
    "clip_text": ("CLIPTextModel", TEXT, 5, 2),
    "clip_vision": ("CLIPVisionModel", IMAGE, 6, 2),
    "siglip": ("SiglipVisionModel", IMAGE, 6, 2),
    "vit": ("ViTModel", IMAGE, 5, 2),
    "deit": ("DeiTModel", IMAGE, 5, 2),
    "dinov2": ("Dinov2Model", IMAGE, 5, 2),
    "convnext": (
        "ConvNextModel",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 16},
        5,
        0,
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "conv_dim": [16, 16],
            "conv_stride": [4, 4],
            "conv_kernel": [8, 8],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
            "feat_extract_norm": "layer",
        },
        8,
        3,
    ),
}
# What transformers holds of these kinds and is left, with a word of the reason.
LEFT = {
    "qwen3_next": {"Qwen3NextRMSNormGated": "not a norm this package knows"},
    "wav2vec2": {"_WeightNorm": "not a norm this package knows"},
}
RESIDUAL_LEFT = {
    "olmo2": "Olmo2DecoderLayer",
    "cohere": "CohereDecoderLayer",
    "cohere2": "Cohere2DecoderLayer",
    "phi": "PhiDecoderLayer",
    "bloom": "BloomBlock",
    "falcon": "FalconDecoderLayer",
    "mamba": "MambaBlock",
    "wav2vec2": "Wav2Vec2LayerNormConvLayer",
    "stablelm_parallel": "post_attention_layernorm is NoneType",
}
GENERATES = ["llama", "qwen3", "gemma2", "gpt2", "opt", "nemotron", "t5", "bart", "whisper"]


def build(name: str, **options) -> tuple[nn.Module, dict[str, Tensor]]:
    """A stock model of the family in training mode, and an input for it."""
    class_name, config, _, _ = FAMILIES[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(cls.config_class(**{**config, **options}))
    with torch.no_grad():
        for p in model.parameters():  # a weight of ones would hide 1 + w, a bias of zeros a missing bias
            p.add_(torch.randn_like(p) * 0.05)
    ids = torch.randint(3, 99, (2, 10))
    if "ForConditionalGeneration" in class_name or class_name.startswith("Marian"):
        inputs = {"decoder_input_ids": ids[:, :7]}
        inputs |= {"input_features": torch.randn(2, 8, 40)} if name == "whisper" else {"input_ids": ids}
    elif model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif model.main_input_name == "input_values":
        inputs = {"input_values": torch.randn(2, 400)}
    else:
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(10) < torch.tensor([[10], [7]])).long()}
    return model, inputs


def patched_copy(stock: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(stock)
    fused_norm.patch(model, **options)
    return model


def floats(value) -> Iterator[Tensor]:
    """Every floating tensor of a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from floats(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floats(item)


def forward(model: nn.Module, inputs: dict[str, Tensor], **options) -> list[Tensor]:
    if hasattr(model, "generate"):
        options.setdefault("use_cache", False)
    return list(floats(model(**inputs, **options)))


def loss(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in outputs)


def gradients(model: nn.Module, inputs: dict[str, Tensor], **options) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    outputs = forward(model, inputs, **options)
    loss(outputs).backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: tuple, expected: tuple, rtol: float = 1e-4, grad_rtol: float = 1e-3) -> None:
    """Outputs within ``rtol`` of their largest element (at least 1), gradients within ``grad_rtol`` in norm; one that
    is 0 but for rounding (a key's bias) is measured by the others."""
    assert len(actual[0]) == len(expected[0]) > 0
    for a, b in zip(actual[0], expected[0], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= rtol * max(1.0, b.abs().max())
    assert actual[1].keys() == expected[1].keys() and len(expected[1]) > 0
    largest = max(g.float().norm() for g in expected[1].values())
    for name, g in expected[1].items():
        error = (actual[1][name].float() - g.float()).norm()
        assert error <= grad_rtol * max(g.float().norm(), 1e-3 * largest), (name, error, g.norm())


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# Every family


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    """Outputs and all gradients of the stock model, norms alone and with the residual paths; and back."""
    stock, inputs = build(name)
    stock.eval()
    expected = gradients(stock, inputs)
    before, keys = classes(stock), list(stock.state_dict())
    model = copy.deepcopy(stock)

    report = fused_norm.patch(model, residual=False)
    assert len(report.swapped) == FAMILIES[name][2] and report.residual == []
    assert_close(gradients(model, inputs), expected)

    report = fused_norm.patch(model)
    assert report.swapped == [] and len(report.residual) == FAMILIES[name][3], str(report)
    assert_close(gradients(model, inputs), expected)
    left = {where: reason for where, reason in report.left.items() if "fused already" not in reason}
    for reason in left.values():
        assert any(kind in reason and why in reason for kind, why in LEFT.get(name, {}).items()), reason
    assert bool(left) == (name in LEFT)
    for reason in report.residual_left.values():
        assert RESIDUAL_LEFT[name] in reason
    assert bool(report.residual_left) == (name in RESIDUAL_LEFT)

    assert list(model.state_dict()) == keys
    for where, cls in classes(model).items():
        assert issubclass(cls, before[where])
        if cls is not fused_norm.LayerNorm and cls is not fused_norm.RMSNorm:
            assert (cls.__name__, cls.__module__, str(cls)) == (
                before[where].__name__,
                before[where].__module__,
                str(before[where]),
            )
    again = fused_norm.patch(model)
    assert again.swapped == again.residual == []
    assert len(fused_norm.unpatch(model)) == FAMILIES[name][2] + FAMILIES[name][3]
    assert classes(model) == before
    assert {n: set(vars(m)) for n, m in model.named_modules()} == {n: set(vars(m)) for n, m in stock.named_modules()}
    for a, b in zip(forward(model, inputs), expected[0], strict=True):
        assert torch.equal(a, b)


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 20


@pytest.mark.parametrize(
    "name", ["bert", "deberta", "llama", "gemma2", "t5", "olmo", "cohere", "nemotron", "bart", "qwen3"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(name: str, dtype: torch.dtype) -> None:
    """As far from the model in fp64 as the stock one is: the same roundings, or fewer."""
    stock, inputs = build(name)
    stock.eval().to(dtype)
    model = patched_copy(stock)
    truth = forward(copy.deepcopy(stock).double(), inputs)[0]
    theirs, ours = (forward(m, inputs)[0] for m in (stock, model))
    assert ours.dtype == theirs.dtype == dtype
    error = (theirs - truth).abs()
    assert (ours - truth).abs().mean() <= 1.3 * error.mean()
    assert (ours - truth).abs().max() <= 2 * error.max()


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "t5", "olmo", "cohere", "nemotron", "gpt2", "whisper"])
def test_autocast_on_cpu(name: str) -> None:
    """fp32 parameters, bf16 matrix products: the residual path stays fp32 where the stock model's does."""
    stock, inputs = build(name)
    stock.eval()
    model = patched_copy(stock)
    truth = forward(stock, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (gradients(m, inputs) for m in (stock, model))
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.dtype == b.dtype
    error = (theirs[0][0] - truth).abs()
    assert (ours[0][0] - truth).abs().mean() <= 1.3 * error.mean()
    for where, g in theirs[1].items():
        assert ours[1][where].dtype == g.dtype
        assert (ours[1][where] - g).norm() <= 0.05 * max(g.norm(), 0.05 * max(h.norm() for h in theirs[1].values()))


# What becomes of a patched model


@pytest.mark.parametrize("name", ["bert", "llama", "nemotron", "gpt2", "convnext"])
def test_copies_and_pickles(name: str, tmp_path) -> None:
    stock, inputs = build(name)
    stock.eval()
    model = patched_copy(stock)
    torch.save(model, tmp_path / "model.pt")
    expected = forward(model, inputs)
    for clone in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert classes(clone) == classes(model)
        for a, b in zip(forward(clone, inputs), expected, strict=True):
            assert torch.equal(a, b)
        fused_norm.unpatch(clone)
        assert classes(clone) == classes(stock)
    assert b"fused_norm" not in pickle.dumps(stock)


def test_unpickles_as_the_stock_class_where_the_adapter_is_unknown(monkeypatch) -> None:
    """Another version of transformers, whose forward this package does not know."""
    stock, inputs = build("llama")
    stock.eval()
    data = pickle.dumps(patched_copy(stock))
    monkeypatch.setattr(adapters, "adapter", lambda cls: None)
    loaded = pickle.loads(data)
    assert classes(loaded) == classes(stock)
    assert torch.equal(forward(loaded, inputs)[0], forward(stock, inputs)[0])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_save_and_load_pretrained(name: str, tmp_path) -> None:
    stock, inputs = build(name)
    model = patched_copy(stock.eval())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert classes(loaded) == classes(stock)
    assert torch.equal(forward(loaded, inputs)[0], forward(stock, inputs)[0])
    assert fused_norm.patch(loaded).residual


@pytest.mark.parametrize("name", GENERATES)
def test_generate(name: str) -> None:
    stock, inputs = build(name)
    stock.eval()
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "use_cache": True}
    tokens = [model.generate(**inputs, **options) for model in (stock, patched_copy(stock))]
    assert tokens[0].shape[1] > 7 and torch.equal(*tokens)


@pytest.mark.parametrize("name", ["llama", "bert", "whisper"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """With dropout: the recomputed masks are those of the first pass, so the gradients are those without."""
    stock, inputs = build(name)
    model = patched_copy(stock).train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(3)
        results.append(gradients(model, inputs))
    assert_close(results[1], results[0], 1e-6, 1e-5)


def test_hidden_states_and_attentions() -> None:
    """transformers captures them by hooks on the layers, which it finds by class."""
    stock, inputs = build("llama", attn_implementation="eager")
    stock.eval()
    options = {"output_hidden_states": True, "output_attentions": True}
    theirs, ours = (list(floats(m(**inputs, **options, use_cache=False))) for m in (stock, patched_copy(stock)))
    assert len(ours) == len(theirs) >= 6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break() -> None:
    for name in ("bert", "llama"):
        stock, inputs = build(name)
        model = patched_copy(stock.eval())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        options = {} if name == "bert" else {"use_cache": False}
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(**inputs, **options)[0], stock(**inputs, **options)[0], rtol=1e-4, atol=1e-5
            )


# Dropout


DROPS = {
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0},
    "phi3": {"resid_pdrop": 0.3},
    "bart": {"dropout": 0.3},
    "vit": {"hidden_dropout_prob": 0.3},
}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_has_the_same_statistics(name: str) -> None:
    """Mean and spread of a loss over seeds, within what their number allows."""
    stock, inputs = build(name, **DROPS[name])
    model = patched_copy(stock)
    samples = {}
    with torch.no_grad():
        for which, m in (("stock", stock), ("patched", model)):
            m.train()
            values = []
            for seed in range(150):
                torch.manual_seed(seed)
                values.append(loss(forward(m, inputs)))
            samples[which] = torch.stack(values).double()
    mean = {which: v.mean() for which, v in samples.items()}
    spread = {which: v.std() for which, v in samples.items()}
    assert spread["stock"] > 0.01
    error = (samples["stock"].var() / 150 + samples["patched"].var() / 150).sqrt()
    assert abs(mean["patched"] - mean["stock"]) < 4 * error
    assert 0.75 < spread["patched"] / spread["stock"] < 1.33  # 150 samples: 6 % each
    assert len(set(samples["patched"].tolist())) == 150


@pytest.mark.parametrize("name", DROPS)
def test_dropout_follows_the_seed_and_the_mode(name: str) -> None:
    stock, inputs = build(name, **DROPS[name])
    model = patched_copy(stock).train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(gradients(model, inputs))
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert all(torch.equal(g, results[1][1][where]) for where, g in results[0][1].items())
    assert not torch.equal(results[0][0][0], results[2][0][0])
    assert_close(gradients(model.eval(), inputs), gradients(stock.eval(), inputs))


def test_keep_rate_of_a_block() -> None:
    """A fused BertOutput with a dense layer of ones and no residual: what is dropped is 0 before the norm."""
    stock, _ = build("bert", hidden_dropout_prob=0.2)
    block = patched_copy(stock).encoder.layer[0].output.train()
    n = block.dense.weight.shape[0]
    block.LayerNorm = fused_norm.LayerNorm(n, elementwise_affine=False)
    x = torch.ones(4000, block.dense.in_features)
    with torch.no_grad():
        block.dense.weight.zero_()
        block.dense.bias.fill_(1.0)
        y = block(x, torch.zeros(4000, n))
    kept = (y > 0).double().mean()  # kept elements lie above the mean of their row
    assert abs(kept - 0.8) < 5 * (0.8 * 0.2 / y.numel()) ** 0.5


def test_dropout_of_the_block_has_a_mode_of_its_own() -> None:
    """Stock BERT asks its dropout module, not the block, whether it is training."""
    stock, inputs = build("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    model = patched_copy(stock).train()
    for m in (stock.train(), model):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    assert_close(gradients(model, inputs), gradients(stock, inputs))


# What a fused block looks at when it is called


@pytest.fixture
def fused_additions(monkeypatch) -> list[str]:
    """The calls of add_layer_norm and add_rms_norm from here on, by name."""
    calls = []
    for name in ("add_layer_norm", "add_rms_norm"):
        original = getattr(adapters.FF, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(adapters.FF, name, counted)
    return calls


def test_additions_are_fused(fused_additions) -> None:
    for name, expected in (("bert", ["add_layer_norm"] * 4), ("llama", ["add_rms_norm"] * 2), ("whisper", None)):
        stock, inputs = build(name)
        fused_additions.clear()
        forward(patched_copy(stock), inputs)
        assert fused_additions == (expected or ["add_layer_norm"] * 6)
        fused_additions.clear()
        forward(patched_copy(stock, residual=False), inputs)
        assert fused_additions == []


class Watched(nn.Module):
    """A norm in the place of another: a LoRA wrapper, a quantised norm."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


class LoudDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3


def _norm_hook(block):
    block.LayerNorm.register_forward_hook(lambda module, args, output: output * 2)


def _norm_pre_hook(block):
    block.LayerNorm.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))


def _dropout_hook(block):
    block.dropout.register_forward_hook(lambda module, args, output: output * 2)


def _backward_hook(block):
    block.LayerNorm.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))


def _wrapped_norm(block):
    block.LayerNorm = Watched(block.LayerNorm)


def _identity_norm(block):
    block.LayerNorm = nn.Identity()


def _dropout_subclass(block):
    block.dropout = LoudDropout(0.1)


def _no_dropout(block):
    block.dropout = nn.Identity()


def _parametrized_norm(block):
    nn.utils.parametrize.register_parametrization(block.LayerNorm, "weight", nn.Softplus())


def _own_forward(block):
    block.LayerNorm.forward = lambda x: x * 2


def _stock_norm(block):
    fused_norm.unpatch(block.LayerNorm)


CHANGES = [
    _norm_hook,
    _norm_pre_hook,
    _dropout_hook,
    _backward_hook,
    _wrapped_norm,
    _identity_norm,
    _dropout_subclass,
    _no_dropout,
    _parametrized_norm,
    _own_forward,
    _stock_norm,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_a_changed_block_computes_what_it_should(change, when: str, fused_additions) -> None:
    stock, inputs = build("bert")
    stock.eval()
    model = copy.deepcopy(stock)
    if when == "after patch":
        fused_norm.patch(model)
    change(model.encoder.layer[0].output)
    change(stock.encoder.layer[0].output)
    if when == "before patch":
        fused_norm.patch(model)
    actual, expected = gradients(model, inputs), gradients(stock, inputs)
    assert_close(actual, expected)
    apart = "norm" in change.__name__ or change in (_backward_hook, _own_forward)  # a dropout alone can stand apart
    fused_again = change is _stock_norm and when == "before patch"
    assert len(fused_additions) == (3 if apart and not fused_again else 4)
    restored = fused_norm.unpatch(model)
    assert restored
    for where, cls in classes(model).items():
        if where in classes(stock) and "LayerNorm" not in where:
            assert cls is classes(stock)[where]
    assert_close(gradients(model, inputs), expected)


def test_a_global_hook_sees_every_module(fused_additions) -> None:
    stock, inputs = build("bert")
    model = patched_copy(stock.eval())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        forward(model, inputs)
    finally:
        handle.remove()
    expected = {
        m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.Dropout)) and "attention.self" not in str(m)
    }
    assert fused_additions == []
    assert {m for m in expected if isinstance(m, nn.LayerNorm)} <= set(seen)


def test_a_deprecated_keyword_still_works() -> None:
    """transformers renames past_key_values and warns: the adapter leaves that to it."""
    stock, _ = build("llama")
    layer = stock.model.layers[0]
    if "cache" not in inspect.signature(layer.forward).parameters:
        pytest.skip("this transformers does not rename the keyword")
    fused_norm.patch(stock.eval())
    x = torch.randn(1, 3, 32)
    position_embeddings = stock.model.rotary_emb(x, position_ids=torch.arange(3)[None])
    results = []
    for keyword in ("cache", "past_key_values"):
        cache = transformers.DynamicCache(config=stock.config)
        with pytest.warns(FutureWarning) if keyword == "past_key_values" else contextlib.nullcontext():
            results.append(layer(x, position_embeddings=position_embeddings, **{keyword: cache}))
        assert cache.get_seq_length() == 3
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_signatures_are_the_stock_ones() -> None:
    for name in ("bert", "llama", "t5"):
        stock, _ = build(name)
        model = patched_copy(stock)
        for a, b in zip(model.modules(), stock.modules(), strict=True):
            if adapters.stock_class(type(a)) is not None:
                assert inspect.signature(a.forward) == inspect.signature(b.forward)


# What is not known is left


def _swap_class(model: nn.Module, old: type, new: type) -> None:
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new


def test_a_subclass_of_a_known_class_is_left() -> None:
    stock, _ = build("llama")
    norm, layer = type(stock.model.norm), type(stock.model.layers[0])

    class Louder(norm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    class Layer(layer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    stock.model.layers[0].input_layernorm.__class__ = Louder
    stock.model.layers[1].__class__ = Layer
    report = fused_norm.patch(stock)
    assert len(report.swapped) == 4 and report.residual == ["model.layers.0"]
    assert "Louder is a subclass of LlamaRMSNorm" in report.left["model.layers.0.input_layernorm"]
    assert "Layer is a subclass of LlamaDecoderLayer" in report.residual_left["model.layers.1"]


def test_code_from_elsewhere_is_left() -> None:
    """Remote code has the same names, and may have the same code, which then is said."""
    stock, _ = build("llama")
    norm = type(stock.model.norm)
    for body, reason in (
        ({"forward": norm.forward}, "but is transformers_modules.llama's own"),
        ({"forward": lambda self, hidden_states: hidden_states}, "is not a norm this package knows"),
    ):
        remote = type("LlamaRMSNorm", (nn.Module,), {**body, "__module__": "transformers_modules.llama"})
        model = copy.deepcopy(stock)
        _swap_class(model, norm, remote)
        report = fused_norm.patch(model)
        assert report.swapped == [] and len(report.left) == 5
        assert all(reason in text and "LlamaRMSNorm" in text for text in report.left.values())
        assert report.residual == [] and "post_attention_layernorm is LlamaRMSNorm" in str(report)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_patched_class_is_left(wraps: bool, monkeypatch) -> None:
    """Liger and others replace forward for all of a kind, also after a first patch; some say what they wrap."""
    stock, _ = build("llama")
    stock.eval()
    fused_norm.patch(copy.deepcopy(stock))
    for cls in (type(stock.model.norm), type(stock.model.layers[0])):
        original = cls.forward

        def replaced(self, *args, _original=original, **kwargs):
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", functools.wraps(original)(replaced) if wraps else replaced)
    model = copy.deepcopy(stock)
    report = fused_norm.patch(model)
    assert report.swapped == [] and report.residual == [] and len(report.left) == 5
    assert classes(model) == classes(stock)


def test_a_patched_torch_class_is_left(monkeypatch) -> None:
    stock, _ = build("gpt2")
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, input: input)
    report = fused_norm.patch(stock)
    assert report.swapped == [] and len(report.left) == 5
    assert all("was replaced" in reason for reason in report.left.values())


def test_a_forward_on_the_module_is_left() -> None:
    stock, _ = build("llama")
    stock.model.norm.forward = lambda x: x
    stock.model.layers[0].forward = stock.model.layers[0].forward
    report = fused_norm.patch(stock)
    assert len(report.swapped) == 4 and report.residual == ["model.layers.1"]
    assert "kernelize" in report.left["model.norm"] and "kernelize" in report.residual_left["model.layers.0"]


def test_parts_replaced_after_patch_come_back_too() -> None:
    stock, _ = build("llama")
    model = patched_copy(stock.eval())
    model.model.layers[1] = copy.deepcopy(stock.model.layers[1])
    model.model.layers[0].mlp = copy.deepcopy(stock.model.layers[0].mlp)
    report = fused_norm.patch(model)
    assert len(report.swapped) == 2 and report.residual == ["model.layers.1"]
    fused_norm.unpatch(model)
    assert classes(model) == classes(stock)


# Frameworks that look for classes by name


def test_names_that_frameworks_look_for() -> None:
    from transformers.trainer_pt_utils import get_module_class_from_name, get_parameter_names

    stock, _ = build("llama")
    model = patched_copy(stock)
    for name in stock._no_split_modules:
        assert type(stock.model.layers[0]).__name__ == name
        found = get_module_class_from_name(model, name)
        assert sum(isinstance(module, found) for module in model.modules()) == 2
    for name in ("llama", "bert", "t5"):
        stock, _ = build(name)
        model = patched_copy(stock)
        forbidden = [nn.LayerNorm, *{type(m) for m in stock.modules() if "Norm" in type(m).__name__}]
        assert get_parameter_names(model, forbidden) == get_parameter_names(stock, forbidden)
        assert repr(model) == repr(stock)


def test_accelerate_dispatches_a_patched_model() -> None:
    """Its hooks replace forward on each module: norms inside them are called, and a second patch says so."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    stock, inputs = build("llama")
    model = patched_copy(stock.eval())
    expected = forward(model, inputs)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(forward(model, inputs)[0], expected[0], rtol=1e-5, atol=1e-6)
    assert fused_norm.patch(model).swapped == []
    accelerate.hooks.remove_hook_from_submodules(model)
    fused_norm.unpatch(model)
    assert classes(model) == classes(stock)


# T5's casting and others', on the norm alone


NORMS = {
    "llama": ("llama.modeling_llama", "LlamaRMSNorm", (48,)),
    "llama4": ("llama4.modeling_llama4", "Llama4TextRMSNorm", (48,)),
    "olmo2": ("olmo2.modeling_olmo2", "Olmo2RMSNorm", (48,)),
    "helium": ("helium.modeling_helium", "HeliumRMSNorm", (48,)),
    "moshi": ("moshi.modeling_moshi", "MoshiRMSNorm", (48,)),
    "gemma": ("gemma.modeling_gemma", "GemmaRMSNorm", (48,)),
    "gemma4": ("gemma4.modeling_gemma4", "Gemma4RMSNorm", (48,)),
    "gemma4_bare": ("gemma4.modeling_gemma4", "Gemma4RMSNorm", (48, 1e-6, False)),
    "nanochat": ("nanochat.modeling_nanochat", "NanoChatRMSNorm", ()),
    "t5": ("t5.modeling_t5", "T5LayerNorm", (48,)),
    "imagegpt": ("imagegpt.modeling_imagegpt", "ImageGPTLayerNorm", (48,)),
    "olmo": ("olmo.modeling_olmo", "OlmoLayerNorm", (48,)),
    "cohere": ("cohere.modeling_cohere", "CohereLayerNorm", (48,)),
    "cohere_heads": ("cohere.modeling_cohere", "CohereLayerNorm", ((4, 48),)),
    "deberta": ("deberta.modeling_deberta", "DebertaLayerNorm", (48,)),
    "nemotron": ("nemotron.modeling_nemotron", "NemotronLayerNorm1P", (48,)),
    "chameleon": ("chameleon.modeling_chameleon", "ChameleonLayerNorm", ((4, 48),)),
    "esmc": ("esmc.modeling_esmc", "EsmcLayerNorm", (48,)),
}


def _norm(name: str, parameters: torch.dtype) -> nn.Module:
    module, cls, args = NORMS[name]
    namespace = pytest.importorskip(f"transformers.models.{module}", reason=f"this transformers has no {module}")
    norm = getattr(namespace, cls)(*args).to(parameters)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + 1)
    return norm


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norm_in_every_mixture_of_dtypes(name: str, dtype: torch.dtype, parameters: torch.dtype) -> None:
    """The stock norm's dtype, its value within rounding, and its gradients; or its error."""
    stock = _norm(name, parameters)
    fused = copy.deepcopy(stock)
    assert fused_norm.patch(fused).swapped == ["(the model itself)"]
    torch.manual_seed(3)
    x = (torch.randn(5, 4, 48) * 2 + 0.5).to(dtype)
    try:
        expected = stock(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            fused(x)
        return
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ours, theirs = (m(leaf) for m, leaf in zip((fused, stock), leaves, strict=True))
    assert ours.dtype == theirs.dtype == expected.dtype
    eps = max(torch.finfo(d).eps for d in (dtype, parameters, ours.dtype))
    assert (ours - theirs).abs().max() <= 3 * eps * theirs.abs().max()
    dy = torch.randn_like(theirs)
    results = []
    for m, leaf, y in ((fused, leaves[0], ours), (stock, leaves[1], theirs)):
        results.append(torch.autograd.grad(y, [leaf, *m.parameters()], dy, allow_unused=True))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 4 * eps * b.double().norm() + 1e-7


@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "cohere", "nemotron"])
def test_norm_of_a_size_that_does_not_fit(name: str) -> None:
    """The stock norm broadcasts, or refuses: so does ours."""
    stock = _norm(name, torch.float32)
    fused = copy.deepcopy(stock)
    fused_norm.patch(fused)
    for shape in ((3, 1), (3, 47), (48, 1)):
        x = torch.randn(shape)
        try:
            expected = stock(x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                fused(x)
            continue
        torch.testing.assert_close(fused(x), expected)
