"""Residual blocks of transformers whose addition joins the norm that follows it; ``adapters`` says how they are found.

Each ``_Stock...`` holds a forward of transformers, and the function below it is the same with ``residual + x`` and the
norm of the sum as one :func:`add_norm`, which does them apart where it must. What is left: an addition whose norm is in
another module, as a decoder layer's last, which the next layer's first norm takes: hooks, checkpoints and offloading
work by the layer, and see its sum.
"""

from __future__ import annotations

import torch
from torch import nn

from .adapters import add_norm, dropout_add_norm, known

# Post-norm: BERT and its copies


class _StockBertOutput:
    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states


@known(_StockBertOutput, norms=("LayerNorm",))
def _bert_output(self, hidden_states, input_tensor):
    return dropout_add_norm(self.LayerNorm, self.dropout, self.dense(hidden_states), input_tensor)[0]


class _StockMPNetAttention:
    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        self_outputs = self.attn(hidden_states, attention_mask, position_bias, output_attentions=output_attentions)
        attention_output = self.LayerNorm(self.dropout(self_outputs[0]) + hidden_states)
        outputs = (attention_output,) + self_outputs[1:]  # noqa: RUF005 (as transformers has it)
        return outputs


@known(_StockMPNetAttention, norms=("LayerNorm",))
def _mpnet_attention(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
    outputs = self.attn(hidden_states, attention_mask, position_bias, output_attentions=output_attentions)
    return (dropout_add_norm(self.LayerNorm, self.dropout, outputs[0], hidden_states)[0], *outputs[1:])


class _StockDistilBertBlock:
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attention_output, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attention_output = self.sa_layer_norm(attention_output + hidden_states)
        ffn_output = self.ffn(attention_output)
        ffn_output = self.output_layer_norm(ffn_output + attention_output)
        return ffn_output


@known(_StockDistilBertBlock, norms=("sa_layer_norm", "output_layer_norm"))
def _distilbert_block(self, hidden_states, attention_mask=None, **kwargs):
    attention_output, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
    attention_output, _ = add_norm(self.sa_layer_norm, attention_output, hidden_states)
    return add_norm(self.output_layer_norm, self.ffn(attention_output), attention_output)[0]


class _StockXLNetFeedForward:
    def forward(self, inp):
        output = inp
        output = self.layer_1(output)
        output = self.activation_function(output)
        output = self.dropout(output)
        output = self.layer_2(output)
        output = self.dropout(output)
        output = self.layer_norm(output + inp)
        return output


@known(_StockXLNetFeedForward, norms=("layer_norm",))
def _xlnet_feed_forward(self, inp):
    output = self.layer_2(self.dropout(self.activation_function(self.layer_1(inp))))
    return dropout_add_norm(self.layer_norm, self.dropout, output, inp)[0]


# Pre-norm: Llama and its copies


class _StockLlamaLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockLlamaLayer, norms=("post_attention_layernorm",))
def _llama_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states, residual = add_norm(self.post_attention_layernorm, attention, hidden_states)
    return residual + self.mlp(hidden_states)


class _StockMixtralLayer:
    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockMixtralLayer, norms=("post_attention_layernorm",))
def _mixtral_layer(
    self,
    hidden_states,
    position_embeddings=None,
    attention_mask=None,
    position_ids=None,
    cache=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        **kwargs,
    )
    hidden_states, residual = add_norm(self.post_attention_layernorm, attention, hidden_states)
    return residual + self.mlp(hidden_states)


class _StockNemotronLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockNemotronLayer, norms=("post_attention_layernorm",))
def _nemotron_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
    )
    hidden_states, residual = add_norm(self.post_attention_layernorm, attention, hidden_states)
    return residual + self.mlp(hidden_states)


class _StockGraniteLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states * self.residual_multiplier
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states * self.residual_multiplier
        return hidden_states


@known(_StockGraniteLayer, norms=("post_attention_layernorm",))
def _granite_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    scale = self.residual_multiplier
    hidden_states, residual = add_norm(self.post_attention_layernorm, attention * scale, hidden_states)
    return residual + self.mlp(hidden_states) * scale


class _StockPhi3Layer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, self_attn_weights = self.self_attn(  # noqa: RUF059 (as transformers has it)
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + self.resid_attn_dropout(hidden_states)
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + self.resid_mlp_dropout(hidden_states)
        return hidden_states


@known(_StockPhi3Layer, norms=("post_attention_layernorm",))
def _phi3_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states, residual = dropout_add_norm(
        self.post_attention_layernorm, self.resid_attn_dropout, attention, hidden_states
    )
    return residual + self.resid_mlp_dropout(self.mlp(hidden_states))


class _StockGemma2Layer:
    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **kwargs,
        )
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.pre_feedforward_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.post_feedforward_layernorm(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockGemma2Layer, norms=("pre_feedforward_layernorm",))
def _gemma2_layer(
    self,
    hidden_states,
    position_embeddings=None,
    attention_mask=None,
    position_ids=None,
    cache=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        **kwargs,
    )
    attention = self.post_attention_layernorm(attention)
    hidden_states, residual = add_norm(self.pre_feedforward_layernorm, attention, hidden_states)
    return residual + self.post_feedforward_layernorm(self.mlp(hidden_states))


class _StockStableLmLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        self_attn_output, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
        )
        if self.use_parallel_residual:
            mlp_output = self.mlp(hidden_states)
            mlp_output = self.dropout(mlp_output)
            hidden_states = residual + self_attn_output + mlp_output
        else:
            residual = residual + self_attn_output
            mlp_output = self.mlp(self.post_attention_layernorm(residual))
            mlp_output = self.dropout(mlp_output)
            hidden_states = residual + mlp_output
        return hidden_states


@known(_StockStableLmLayer, norms=("post_attention_layernorm",))
def _stablelm_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    attention, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
    )
    if self.use_parallel_residual:
        return residual + attention + self.dropout(self.mlp(hidden_states))
    hidden_states, residual = add_norm(self.post_attention_layernorm, attention, residual)
    return residual + self.dropout(self.mlp(hidden_states))


class _StockGptOssLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states, _ = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockGptOssLayer, norms=("post_attention_layernorm",))
def _gpt_oss_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states, residual = add_norm(self.post_attention_layernorm, attention, hidden_states)
    return residual + self.mlp(hidden_states)[0]


class _StockPersimmonLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        cache=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = hidden_states + residual
        return hidden_states


@known(_StockPersimmonLayer, norms=("post_attention_layernorm",))
def _persimmon_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    cache=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    attention, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states, residual = add_norm(self.post_attention_layernorm, attention, hidden_states)
    return self.dropout(self.mlp(hidden_states)) + residual


class _StockQwen3NextLayer:
    def forward(self, hidden_states, position_embeddings, attention_mask=None, position_ids=None, cache=None, **kwargs):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.block_type == "linear_attention":
            hidden_states = self.linear_attn(
                hidden_states=hidden_states, cache=cache, attention_mask=attention_mask, **kwargs
            )
        elif self.block_type == "full_attention":
            hidden_states, _ = self.self_attn(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        if isinstance(hidden_states, tuple):
            hidden_states, _ = hidden_states
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockQwen3NextLayer, norms=("post_attention_layernorm",))
def _qwen3_next_layer(
    self, hidden_states, position_embeddings, attention_mask=None, position_ids=None, cache=None, **kwargs
):
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    if self.block_type == "linear_attention":
        hidden_states = self.linear_attn(
            hidden_states=hidden_states, cache=cache, attention_mask=attention_mask, **kwargs
        )
    elif self.block_type == "full_attention":
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    hidden_states, residual = add_norm(self.post_attention_layernorm, hidden_states, residual)
    hidden_states = self.mlp(hidden_states)
    return residual + (hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states)


# Pre-norm: GPT-2


class _StockGPT2Block:
    def forward(
        self,
        hidden_states,
        cache=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_output, _ = self.attn(
            hidden_states,
            cache=cache,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = attn_output + residual
        if encoder_hidden_states is not None:
            if not hasattr(self, "crossattention"):
                raise ValueError(
                    f"If `encoder_hidden_states` are passed, {self} has to be instantiated with "
                    "cross-attention layers by setting `config.add_cross_attention=True`"
                )
            residual = hidden_states
            hidden_states = self.ln_cross_attn(hidden_states)
            cross_attn_output, _ = self.crossattention(
                hidden_states,
                cache=cache,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
            hidden_states = residual + cross_attn_output
        residual = hidden_states
        hidden_states = self.ln_2(hidden_states)
        feed_forward_hidden_states = self.mlp(hidden_states)
        hidden_states = residual + feed_forward_hidden_states
        return hidden_states


@known(_StockGPT2Block, norms=("ln_2",))
def _gpt2_block(
    self,
    hidden_states,
    cache=None,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    use_cache=False,
    **kwargs,
):
    attention, _ = self.attn(
        self.ln_1(hidden_states), cache=cache, attention_mask=attention_mask, use_cache=use_cache, **kwargs
    )
    residual = hidden_states
    if encoder_hidden_states is not None:
        if not hasattr(self, "crossattention"):
            raise ValueError(
                f"If `encoder_hidden_states` are passed, {self} has to be instantiated with "
                "cross-attention layers by setting `config.add_cross_attention=True`"
            )
        hidden_states, residual = add_norm(self.ln_cross_attn, attention, residual)
        attention, _ = self.crossattention(
            hidden_states,
            cache=cache,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
    hidden_states, residual = add_norm(self.ln_2, attention, residual)
    return residual + self.mlp(hidden_states)


class _StockGPTNeoBlock:
    def forward(
        self,
        hidden_states,
        layer_past=None,
        attention_mask=None,
        use_cache=False,
        output_attentions=False,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_output, attn_weights = self.attn(
            hidden_states,
            layer_past=layer_past,
            attention_mask=attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        hidden_states = attn_output + residual
        residual = hidden_states
        hidden_states = self.ln_2(hidden_states)
        feed_forward_hidden_states = self.mlp(hidden_states)
        hidden_states = residual + feed_forward_hidden_states
        return hidden_states, attn_weights


@known(_StockGPTNeoBlock, norms=("ln_2",))
def _gpt_neo_block(
    self,
    hidden_states,
    layer_past=None,
    attention_mask=None,
    use_cache=False,
    output_attentions=False,
    **kwargs,
):
    attention, weights = self.attn(
        self.ln_1(hidden_states),
        layer_past=layer_past,
        attention_mask=attention_mask,
        use_cache=use_cache,
        output_attentions=output_attentions,
    )
    hidden_states, residual = add_norm(self.ln_2, attention, hidden_states)
    return residual + self.mlp(hidden_states), weights


class _StockGPTNeoXLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        use_cache=False,
        layer_past=None,
        position_embeddings=None,
        **kwargs,
    ):
        attn_output, _ = self.attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            layer_past=layer_past,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        attn_output = self.post_attention_dropout(attn_output)
        if self.use_parallel_residual:
            mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
            mlp_output = self.post_mlp_dropout(mlp_output)
            hidden_states = mlp_output + attn_output + hidden_states
        else:
            attn_output = attn_output + hidden_states
            mlp_output = self.mlp(self.post_attention_layernorm(attn_output))
            mlp_output = self.post_mlp_dropout(mlp_output)
            hidden_states = mlp_output + attn_output
        return hidden_states


@known(_StockGPTNeoXLayer, norms=("post_attention_layernorm",))
def _gpt_neox_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    use_cache=False,
    layer_past=None,
    position_embeddings=None,
    **kwargs,
):
    attention, _ = self.attention(
        self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        layer_past=layer_past,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    if self.use_parallel_residual:
        attention = self.post_attention_dropout(attention)
        output = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return output + attention + hidden_states
    hidden_states, residual = dropout_add_norm(
        self.post_attention_layernorm, self.post_attention_dropout, attention, hidden_states
    )
    return self.post_mlp_dropout(self.mlp(hidden_states)) + residual


# Pre-norm: encoders of images and of text beside them


class _StockCLIPLayer:
    def forward(self, hidden_states, attention_mask, **kwargs):
        residual = hidden_states
        hidden_states = self.layer_norm1(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.layer_norm2(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockCLIPLayer, norms=("layer_norm2",))
def _clip_layer(self, hidden_states, attention_mask, **kwargs):
    attention, _ = self.self_attn(
        hidden_states=self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs
    )
    hidden_states, residual = add_norm(self.layer_norm2, attention, hidden_states)
    return residual + self.mlp(hidden_states)


class _StockBlipLayer:
    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states = self.layer_norm1(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = hidden_states + residual
        residual = hidden_states
        hidden_states = self.layer_norm2(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = hidden_states + residual
        return hidden_states


@known(_StockBlipLayer, norms=("layer_norm2",))
def _blip_layer(self, hidden_states, **kwargs):
    attention, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
    hidden_states, residual = add_norm(self.layer_norm2, attention, hidden_states)
    return self.mlp(hidden_states) + residual


class _StockViTLayer:
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        residual = hidden_states
        hidden_states = self.layernorm_before(hidden_states)
        hidden_states, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = self.dropout(hidden_states)
        hidden_states = hidden_states + residual
        residual = hidden_states
        hidden_states = self.layernorm_after(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = hidden_states + residual
        return hidden_states


@known(_StockViTLayer, norms=("layernorm_after",))
def _vit_layer(self, hidden_states, attention_mask=None, **kwargs):
    attention, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
    hidden_states, residual = dropout_add_norm(self.layernorm_after, self.dropout, attention, hidden_states)
    return self.dropout(self.mlp(hidden_states)) + residual


class _StockDinov2Layer:
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        residual = hidden_states
        hidden_states = self.norm1(hidden_states)
        hidden_states, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = self.layer_scale1(hidden_states)
        hidden_states = self.drop_path(hidden_states) + residual
        residual = hidden_states
        hidden_states = self.norm2(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = self.layer_scale2(hidden_states)
        hidden_states = self.drop_path(hidden_states) + residual
        return hidden_states


@known(_StockDinov2Layer, norms=("norm2",))
def _dinov2_layer(self, hidden_states, attention_mask=None, **kwargs):
    attention, _ = self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
    attention = self.drop_path(self.layer_scale1(attention))
    hidden_states, residual = add_norm(self.norm2, attention, hidden_states)
    return self.drop_path(self.layer_scale2(self.mlp(hidden_states))) + residual


class _StockQwen2VLVisionBlock:
    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        hidden_states = hidden_states + self.attn(
            self.norm1(hidden_states), cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
        )
        hidden_states = hidden_states + self.mlp(self.norm2(hidden_states))
        return hidden_states


@known(_StockQwen2VLVisionBlock, norms=("norm2",))
def _qwen2_vl_vision_block(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
    attention = self.attn(
        self.norm1(hidden_states), cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
    )
    hidden_states, residual = add_norm(self.norm2, attention, hidden_states)
    return residual + self.mlp(hidden_states)


class _StockModernBertLayer:
    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        attn_output, _ = self.attn(
            self.attn_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states


@known(_StockModernBertLayer, norms=("mlp_norm",))
def _modernbert_layer(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
    attention, _ = self.attn(
        self.attn_norm(hidden_states),
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        **kwargs,
    )
    hidden_states, residual = add_norm(self.mlp_norm, attention, hidden_states)
    return residual + self.mlp(hidden_states)


# Encoders and decoders of BART (post-norm), of mBART and Whisper (pre-norm), of OPT (either)


class _StockBartEncoderLayer:
    def forward(self, hidden_states, attention_mask, **kwargs):
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        hidden_states = self.final_layer_norm(hidden_states)
        if hidden_states.dtype == torch.float16 and not torch.isfinite(hidden_states).all():
            clamp_value = torch.finfo(hidden_states.dtype).max - 1000
            hidden_states = torch.clamp(hidden_states, min=-clamp_value, max=clamp_value)
        return hidden_states


def _feed_forward(self, hidden_states):
    """fc2 of the layers of this section, before its dropout."""
    hidden_states = self.activation_fn(self.fc1(hidden_states))
    return self.fc2(nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training))


@known(_StockBartEncoderLayer, norms=("self_attn_layer_norm", "final_layer_norm"))
def _bart_encoder_layer(self, hidden_states, attention_mask, **kwargs):
    p, training = self.dropout, self.training
    attention, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
    hidden_states, _ = add_norm(self.self_attn_layer_norm, attention, hidden_states, p, training)
    hidden_states, _ = add_norm(self.final_layer_norm, _feed_forward(self, hidden_states), hidden_states, p, training)
    if hidden_states.dtype == torch.float16 and not torch.isfinite(hidden_states).all():
        clamp_value = torch.finfo(hidden_states.dtype).max - 1000
        hidden_states = torch.clamp(hidden_states, min=-clamp_value, max=clamp_value)
    return hidden_states


class _StockBartDecoderLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        use_cache=True,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        if encoder_hidden_states is not None:
            residual = hidden_states
            hidden_states, _ = self.encoder_attn(
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
            hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
            hidden_states = residual + hidden_states
            hidden_states = self.encoder_attn_layer_norm(hidden_states)
        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states


@known(_StockBartDecoderLayer, norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"))
def _bart_decoder_layer(
    self,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    cache=None,
    use_cache=True,
    **kwargs,
):
    p, training = self.dropout, self.training
    attention, _ = self.self_attn(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
    hidden_states, _ = add_norm(self.self_attn_layer_norm, attention, hidden_states, p, training)
    if encoder_hidden_states is not None:
        attention, _ = self.encoder_attn(
            hidden_states,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states, _ = add_norm(self.encoder_attn_layer_norm, attention, hidden_states, p, training)
    return add_norm(self.final_layer_norm, _feed_forward(self, hidden_states), hidden_states, p, training)[0]


class _StockMBartEncoderLayer:
    def forward(self, hidden_states, attention_mask, **kwargs):
        residual = hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        if hidden_states.dtype == torch.float16:
            clamp_value = torch.finfo(hidden_states.dtype).max - 1000
            hidden_states = torch.clamp(hidden_states, min=-clamp_value, max=clamp_value)
        return hidden_states


@known(_StockMBartEncoderLayer, norms=("final_layer_norm",))
def _mbart_encoder_layer(self, hidden_states, attention_mask, **kwargs):
    p, training = self.dropout, self.training
    attention, _ = self.self_attn(
        hidden_states=self.self_attn_layer_norm(hidden_states), attention_mask=attention_mask, **kwargs
    )
    hidden_states, residual = add_norm(self.final_layer_norm, attention, hidden_states, p, training)
    hidden_states = residual + nn.functional.dropout(_feed_forward(self, hidden_states), p=p, training=training)
    if hidden_states.dtype == torch.float16:
        clamp_value = torch.finfo(hidden_states.dtype).max - 1000
        hidden_states = torch.clamp(hidden_states, min=-clamp_value, max=clamp_value)
    return hidden_states


class _StockMBartDecoderLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        use_cache=True,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states, cache=cache, attention_mask=attention_mask, **kwargs
        )
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        if encoder_hidden_states is not None:
            residual = hidden_states
            hidden_states = self.encoder_attn_layer_norm(hidden_states)
            hidden_states, _ = self.encoder_attn(
                hidden_states=hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
            hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
            hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockMBartDecoderLayer, norms=("encoder_attn_layer_norm", "final_layer_norm"))
def _mbart_decoder_layer(
    self,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    cache=None,
    use_cache=True,
    **kwargs,
):
    p, training = self.dropout, self.training
    attention, _ = self.self_attn(
        hidden_states=self.self_attn_layer_norm(hidden_states), cache=cache, attention_mask=attention_mask, **kwargs
    )
    residual = hidden_states
    if encoder_hidden_states is not None:
        hidden_states, residual = add_norm(self.encoder_attn_layer_norm, attention, residual, p, training)
        attention, _ = self.encoder_attn(
            hidden_states=hidden_states,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            cache=cache,
            **kwargs,
        )
    hidden_states, residual = add_norm(self.final_layer_norm, attention, residual, p, training)
    return residual + nn.functional.dropout(_feed_forward(self, hidden_states), p=p, training=training)


class _StockWhisperDecoderLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        cache=None,
        use_cache=True,
        **kwargs,
    ):
        residual = hidden_states
        hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        if encoder_hidden_states is not None:
            residual = hidden_states
            hidden_states = self.encoder_attn_layer_norm(hidden_states)
            hidden_states, _ = self.encoder_attn(
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
            hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
            hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        return hidden_states


@known(_StockWhisperDecoderLayer, norms=("encoder_attn_layer_norm", "final_layer_norm"))
def _whisper_decoder_layer(
    self,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    cache=None,
    use_cache=True,
    **kwargs,
):
    p, training = self.dropout, self.training
    attention, _ = self.self_attn(
        self.self_attn_layer_norm(hidden_states), cache=cache, attention_mask=attention_mask, **kwargs
    )
    residual = hidden_states
    if encoder_hidden_states is not None:
        hidden_states, residual = add_norm(self.encoder_attn_layer_norm, attention, residual, p, training)
        attention, _ = self.encoder_attn(
            hidden_states,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            cache=cache,
            **kwargs,
        )
    hidden_states, residual = add_norm(self.final_layer_norm, attention, residual, p, training)
    return residual + nn.functional.dropout(_feed_forward(self, hidden_states), p=p, training=training)


class _StockOPTLayer:
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        cache=None,
        use_cache=False,
        position_ids=None,
        **kwargs,
    ):
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            cache=cache,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = residual + hidden_states
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states_shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, hidden_states.size(-1))
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        hidden_states = (residual + hidden_states).view(hidden_states_shape)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states


@known(_StockOPTLayer, norms=("self_attn_layer_norm", "final_layer_norm"))
def _opt_layer(
    self,
    hidden_states,
    attention_mask=None,
    cache=None,
    use_cache=False,
    position_ids=None,
    **kwargs,
):
    p, training, before = self.dropout, self.training, self.do_layer_norm_before
    residual, shape = hidden_states, hidden_states.shape
    if before:
        hidden_states = self.self_attn_layer_norm(hidden_states)
    attention, _ = self.self_attn(
        hidden_states=hidden_states,
        cache=cache,
        position_ids=position_ids,
        attention_mask=attention_mask,
        **kwargs,
    )
    if before:  # the stock layer folds its input to (tokens, hidden) between the two norms
        attention, residual = attention.reshape(-1, attention.shape[-1]), residual.reshape(-1, residual.shape[-1])
        hidden_states, residual = add_norm(self.final_layer_norm, attention, residual, p, training)
        hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states)))
        hidden_states = nn.functional.dropout(hidden_states, p=p, training=training)
        return (residual + hidden_states).view(shape)
    residual, _ = add_norm(self.self_attn_layer_norm, attention, residual, p, training)
    hidden_states = residual.reshape(-1, residual.shape[-1])
    hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states))).view(shape)
    return add_norm(self.final_layer_norm, hidden_states, residual, p, training)[0]


# Encoders of speech


class _StockWav2Vec2Layer:
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attn_residual = hidden_states
        hidden_states, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = self.dropout(hidden_states)
        hidden_states = attn_residual + hidden_states
        hidden_states = self.layer_norm(hidden_states)
        hidden_states = hidden_states + self.feed_forward(hidden_states)
        hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states


@known(_StockWav2Vec2Layer, norms=("layer_norm", "final_layer_norm"))
def _wav2vec2_layer(self, hidden_states, attention_mask=None, **kwargs):
    attention, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
    hidden_states, _ = dropout_add_norm(self.layer_norm, self.dropout, attention, hidden_states)
    return add_norm(self.final_layer_norm, self.feed_forward(hidden_states), hidden_states)[0]


class _StockWav2Vec2StableLayer:
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attn_residual = hidden_states
        hidden_states = self.layer_norm(hidden_states)
        hidden_states, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = self.dropout(hidden_states)
        hidden_states = attn_residual + hidden_states
        hidden_states = hidden_states + self.feed_forward(self.final_layer_norm(hidden_states))
        if self.adapter_layer is not None:
            hidden_states = hidden_states + self.adapter_layer(hidden_states)
        return hidden_states


@known(_StockWav2Vec2StableLayer, norms=("final_layer_norm",))
def _wav2vec2_stable_layer(self, hidden_states, attention_mask=None, **kwargs):
    attention, _ = self.attention(self.layer_norm(hidden_states), attention_mask=attention_mask, **kwargs)
    hidden_states, residual = dropout_add_norm(self.final_layer_norm, self.dropout, attention, hidden_states)
    hidden_states = residual + self.feed_forward(hidden_states)
    if self.adapter_layer is not None:
        hidden_states = hidden_states + self.adapter_layer(hidden_states)
    return hidden_states


# torch's own. What an encoder layer runs outside training (a kernel for the whole layer, where it can) is left to it.


class _StockTorchEncoderLayer:
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        x = self.self_attn(
            x,
            x,
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )[0]
        return self.dropout1(x)

    def _ff_block(self, x):
        x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self.dropout2(x)


_ENCODER_FORWARD = nn.TransformerEncoderLayer.forward  # not recorded: most of it is about the kernel


@known(_StockTorchEncoderLayer, only=nn.TransformerEncoderLayer, norms=("norm1", "norm2"))
def _torch_encoder_layer(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
    if not self.training:
        return _ENCODER_FORWARD(self, src, src_mask, src_key_padding_mask, is_causal)

    def attention(x):
        return self.self_attn(
            x,
            x,
            x,
            attn_mask=src_mask,
            key_padding_mask=src_key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )[0]

    if self.norm_first:
        x, residual = dropout_add_norm(self.norm2, self.dropout1, attention(self.norm1(src)), src)
        return residual + self._ff_block(x)
    x, _ = dropout_add_norm(self.norm1, self.dropout1, attention(src), src)
    return dropout_add_norm(self.norm2, self.dropout2, _torch_feed_forward(self, x), x)[0]


def _torch_feed_forward(self, x):
    return self.linear2(self.dropout(self.activation(self.linear1(x))))


class _StockTorchDecoderLayer:
    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        tgt_is_causal=False,
        memory_is_causal=False,
    ):
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            x = x + self._mha_block(
                self.norm2(x),
                memory,
                memory_mask,
                memory_key_padding_mask,
                memory_is_causal,
            )
            x = x + self._ff_block(self.norm3(x))
        else:
            x = self.norm1(x + self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal))
            x = self.norm2(x + self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal))
            x = self.norm3(x + self._ff_block(x))

        return x

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        x = self.self_attn(
            x,
            x,
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=False,
        )[0]
        return self.dropout1(x)

    def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False):
        x = self.multihead_attn(
            x,
            mem,
            mem,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            need_weights=False,
        )[0]
        return self.dropout2(x)

    def _ff_block(self, x):
        x = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return self.dropout3(x)


@known(_StockTorchDecoderLayer, only=nn.TransformerDecoderLayer, norms=("norm1", "norm2", "norm3"))
def _torch_decoder_layer(
    self,
    tgt,
    memory,
    tgt_mask=None,
    memory_mask=None,
    tgt_key_padding_mask=None,
    memory_key_padding_mask=None,
    tgt_is_causal=False,
    memory_is_causal=False,
):
    def attention(x):
        return self.self_attn(
            x,
            x,
            x,
            attn_mask=tgt_mask,
            key_padding_mask=tgt_key_padding_mask,
            is_causal=tgt_is_causal,
            need_weights=False,
        )[0]

    def cross_attention(x):
        return self.multihead_attn(
            x,
            memory,
            memory,
            attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask,
            is_causal=memory_is_causal,
            need_weights=False,
        )[0]

    if self.norm_first:
        x, residual = dropout_add_norm(self.norm2, self.dropout1, attention(self.norm1(tgt)), tgt)
        x, residual = dropout_add_norm(self.norm3, self.dropout2, cross_attention(x), residual)
        return residual + self._ff_block(x)
    x, _ = dropout_add_norm(self.norm1, self.dropout1, attention(tgt), tgt)
    x, _ = dropout_add_norm(self.norm2, self.dropout2, cross_attention(x), x)
    return dropout_add_norm(self.norm3, self.dropout3, _torch_feed_forward(self, x), x)[0]
