"""Whole transformers, those of the library of that name."""

import torch
import transformers
from helpers.zoo.case import Case, Shapes, columns, image, insert, module, tokens, words
from torch import nn

import taildropout as td


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    return insert(model, ["vit.layers.0.mlp.activation_fn"])


def vit_shapes(k: int) -> Shapes:
    mlp = "vit.layers.0.mlp"
    return module(f"{mlp}.fc1", k, 8) | columns(f"{mlp}.fc2", 8, k)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=20,
    )
    model = transformers.BertForSequenceClassification(config)
    return insert(model, ["bert.encoder.layer.0.intermediate"])


def bert_shapes(k: int) -> Shapes:
    block = "bert.encoder.layer.0"
    return module(f"{block}.intermediate.dense", k, 8) | columns(f"{block}.output.dense", 8, k)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=20,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_inner=12,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    return insert(model, ["transformer.h.0.mlp.act"])


def gpt2_shapes(k: int) -> Shapes:
    """A Conv1D is a Linear whose weight is transposed."""
    mlp = "transformer.h.0.mlp"
    return {
        f"{mlp}.c_fc.weight": (8, k),
        f"{mlp}.c_fc.bias": (k,),
        f"{mlp}.c_proj.weight": (k, 8),
    }


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=20,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return insert(model, [f"model.layers.{i}.mlp.act_fn" for i in (0, 1)])


def llama_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for i, k in enumerate(ks):
        mlp = f"model.layers.{i}.mlp"
        result |= module(f"{mlp}.gate_proj", k, 8, bias=False)
        result |= module(f"{mlp}.up_proj", k, 8, bias=False)
        result |= columns(f"{mlp}.down_proj", 8, k)
    return result


def t5(feed_forward: str) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        feed_forward_proj=feed_forward,
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    td.replace_dropout(model, "*.DenseReluDense.dropout")
    return model


T5_MLPS = ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]


def t5_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for mlp, k in zip(T5_MLPS, ks, strict=True):
        result |= module(f"{mlp}.wi", k, 8, bias=False) | columns(f"{mlp}.wo", 8, k)
    return result


def t5_gated_shapes(*ks: int) -> Shapes:
    result: Shapes = {}
    for mlp, k in zip(T5_MLPS, ks, strict=True):
        result |= module(f"{mlp}.wi_0", k, 8, bias=False)
        result |= module(f"{mlp}.wi_1", k, 8, bias=False)
        result |= columns(f"{mlp}.wo", 8, k)
    return result


def words_with_padding(samples: int) -> tuple[torch.Tensor, ...]:
    mask = torch.ones(samples, 7, dtype=torch.int64)
    mask[-1, 4:] = 0
    return tokens(samples, 7), mask


def two_texts(samples: int) -> tuple[torch.Tensor, ...]:
    return *words_with_padding(samples), tokens(samples, 5)


CASES = {
    "ViT": Case(vit, image(3, 8, 8), (12,), vit_shapes),
    "BERT": Case(bert, words_with_padding, (12,), bert_shapes),
    "GPT-2": Case(gpt2, words, (12,), gpt2_shapes, zero=False),
    "Llama": Case(llama, words, (12, 12), llama_shapes),
    "T5": Case(lambda: t5("relu"), two_texts, (12, 12), t5_shapes),
    "T5, gated": Case(lambda: t5("gated-gelu"), two_texts, (12, 12), t5_gated_shapes, long=True),
}
