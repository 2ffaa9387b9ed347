"""Models of Hugging Face, small and random: a class, a config for each width, inputs, layers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from helpers.zoo.case import with_random_weights
from torch import nn

import taildropout as td
from taildropout import TailDropout

N = 24  # features of what is cut, where the config names it


@dataclass(frozen=True)
class Family:
    """Models of one class, in their default configuration but for sizes.

    Attributes:
        kind: the class.
        config: for a width of what is cut.
        inputs: random arguments by name.
        layers: a regular expression of the modules behind which a TailDropout is put.
        dim: the dim of the features there.
    """

    kind: type
    config: Callable[[int], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    layers: str
    dim: int = -1

    def make(self) -> nn.Module:
        """With random weights in float64, a TailDropout at each place."""
        model = with_random_weights(self.kind(self.config(N))).double().eval()
        names = [name for name, _ in model.named_modules() if re.fullmatch(self.layers, name)]
        for name in names:
            td.insert(model, name, TailDropout(dropout_dim=self.dim))
        return model

    def arguments(self) -> dict[str, torch.Tensor]:
        return {
            name: x.double() if x.is_floating_point() else x for name, x in self.inputs().items()
        }


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TRANSFORMER, "vocab_size": 50, "max_position_embeddings": 32}
PIXELS = {"image_size": 16, "patch_size": 4}


def tokens(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 50, (2, length))


def a_text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def two_texts() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def pixels(size: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def decoder(name: str, layers: str, **options: Any) -> Family:
    return Family(
        getattr(transformers, f"{name}ForCausalLM"),
        lambda width: getattr(transformers, f"{name}Config")(
            **{**TEXT, **TOKENS, "intermediate_size": width, **options}
        ),
        a_text,
        layers,
    )


def encoder(name: str, layers: str = r".*\.intermediate", **options: Any) -> Family:
    return Family(
        getattr(transformers, f"{name}ForSequenceClassification"),
        lambda width: getattr(transformers, f"{name}Config")(
            **{**TEXT, **TOKENS, "intermediate_size": width, **options}
        ),
        a_text,
        layers,
    )


def speech(width: int) -> Any:
    return transformers.WhisperConfig(
        **TOKENS,
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def clip(width: int, vision: int | None = None) -> Any:
    return transformers.CLIPConfig(
        text_config={**TEXT, **TOKENS, "projection_dim": 8, "intermediate_size": width},
        vision_config={
            **TRANSFORMER,
            **PIXELS,
            "projection_dim": 8,
            "intermediate_size": width if vision is None else vision,
        },
        projection_dim=8,
    )


QUERIES = {"num_key_value_heads": 2}

DECODERS = {
    "Llama": decoder("Llama", r".*\.act_fn", **QUERIES),
    "Qwen3": decoder("Qwen3", r".*\.act_fn", **QUERIES, head_dim=8),
    "Mistral": decoder("Mistral", r".*\.act_fn", **QUERIES),
    "Phi3": decoder("Phi3", r".*\.activation_fn", **QUERIES),
    "GPT-NeoX": decoder("GPTNeoX", r".*\.act"),
    "Gemma3": Family(
        transformers.Gemma3ForCausalLM,
        lambda width: transformers.Gemma3TextConfig(
            **TEXT,
            **TOKENS,
            **QUERIES,
            intermediate_size=width,
            head_dim=8,
            query_pre_attn_scalar=8,
        ),
        a_text,
        r".*\.act_fn",
    ),
    "GPT-2": Family(
        transformers.GPT2LMHeadModel,
        lambda width: transformers.GPT2Config(
            vocab_size=50,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_inner=width,
            bos_token_id=1,
            eos_token_id=2,
        ),
        a_text,
        r".*\.mlp\.act",
    ),
    "OPT": Family(
        transformers.OPTForCausalLM,
        lambda width: transformers.OPTConfig(
            **TEXT, **TOKENS, ffn_dim=width, word_embed_proj_dim=16
        ),
        a_text,
        r".*\.activation_fn",
    ),
}

ENCODER_DECODERS = {
    "T5": Family(
        transformers.T5ForConditionalGeneration,
        lambda width: transformers.T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=4,
            d_ff=width,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
        two_texts,
        r".*\.DenseReluDense\.act",
    ),
    "BART": Family(
        transformers.BartForConditionalGeneration,
        lambda width: transformers.BartConfig(
            **TOKENS,
            vocab_size=50,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=width,
            decoder_ffn_dim=width,
            max_position_embeddings=32,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        ),
        two_texts,
        r".*\.activation_fn",
    ),
    "Whisper": Family(
        transformers.WhisperForConditionalGeneration,
        speech,
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(5)},
        r".*layers\.\d+\.activation_fn",
    ),
}

ENCODERS = {
    "BERT": encoder("Bert"),
    "RoBERTa": encoder("Roberta"),
    "MPNet": encoder("MPNet"),
    "ALBERT": encoder("Albert", r".*albert_layers\.0\.activation", embedding_size=8),
    "DeBERTa-v2": encoder(
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    "ModernBERT": encoder(
        "ModernBert",
        r".*\.mlp\.act",
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=4,
    ),
    "DistilBERT": Family(
        transformers.DistilBertForSequenceClassification,
        lambda width: transformers.DistilBertConfig(
            vocab_size=50,
            dim=16,
            n_layers=2,
            n_heads=4,
            hidden_dim=width,
            max_position_embeddings=32,
        ),
        a_text,
        r".*\.ffn\.activation",
    ),
}

IMAGES_AND_SOUND = {
    "ViT": Family(
        transformers.ViTForImageClassification,
        lambda width: transformers.ViTConfig(**TRANSFORMER, **PIXELS, intermediate_size=width),
        pixels(16),
        r".*\.activation_fn",
    ),
    "CLIP": Family(
        transformers.CLIPModel,
        clip,
        lambda: a_text() | pixels(16)(),
        r".*\.activation_fn",
    ),
    "Wav2Vec2": Family(
        transformers.Wav2Vec2ForCTC,
        lambda width: transformers.Wav2Vec2Config(
            **TRANSFORMER,
            **TOKENS,
            vocab_size=50,
            intermediate_size=width,
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        lambda: {"input_values": torch.randn(2, 80)},
        r".*\.feed_forward\.intermediate_dropout",
    ),
    "ResNet": Family(  # all that writes to the channels of a stage
        transformers.ResNetForImageClassification,
        lambda width: transformers.ResNetConfig(
            embedding_size=6, hidden_sizes=[width, 20], depths=[2, 1], layer_type="basic"
        ),
        pixels(32),
        r".*\.stages\.0\.layers\.\d+\.(layer\.0|activation)",
        dim=1,
    ),
    "RegNet": Family(
        transformers.RegNetForImageClassification,
        lambda width: transformers.RegNetConfig(
            embedding_size=6,
            hidden_sizes=[width, 20],
            depths=[2, 1],
            layer_type="x",
            groups_width=4,
        ),
        pixels(32),
        r".*\.stages\.0\.layers\.\d+\.(layer\.[01]|activation)",
        dim=1,
    ),
    "Swin": Family(  # as many features as 3 and, cut to a third, 1 times those of the stage
        transformers.SwinForImageClassification,
        lambda width: transformers.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=2,
            mlp_ratio=width / 8,
        ),
        pixels(16),
        r".*\.blocks\.\d+\.mlp\.activation_fn",
    ),
}
