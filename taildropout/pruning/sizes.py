"""Sizes that modules hold beside their tensors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def mend_attributes(module: nn.Module) -> None:
    """Make the sizes that torch's modules print and check fit their tensors again."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        out_dim, in_dim = (1, 0) if module.transposed else (0, 1)
        if module.groups == 1:
            module.out_channels, module.in_channels = weight.shape[out_dim], weight.shape[in_dim]
        else:
            whole = module.in_channels if module.transposed else module.out_channels
            in_group = module.in_channels // module.groups
            out_group = module.out_channels // module.groups
            module.groups = module.groups * len(weight) // whole
            module.in_channels = module.groups * in_group
            module.out_channels = module.groups * out_group
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = weight if weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = len(tensor)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.RNNBase):
        weights: Any = module.weight_ih_l0
        module.input_size = weights.shape[1]
        module._init_flat_weights()
    elif isinstance(module, nn.RNNCellBase):
        module.input_size = module.weight_ih.shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        module.kdim = (
            module.embed_dim if module.k_proj_weight is None else module.k_proj_weight.shape[1]
        )
        module.vdim = (
            module.embed_dim if module.v_proj_weight is None else module.v_proj_weight.shape[1]
        )
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
        module.nx, module.nf = weight.shape


_QUERIES = re.compile(r"(^|_)(q|qkv|query|in|c)(_|$)|^c_attn$|^q|query")
_KEYS = re.compile(r"(^|_)(k|kv|key)(_|$)|^key")
_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = (
    *("all_head_size", "inner_dim", "intermediate_size", "hidden_features"),
    *("ffn_dim", "d_ff", "n_inner", "intermediate_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
)


_FEATURES = ("hidden_dim", "hidden_size", "embed_dim", "d_model", "dim")


def mend_named_sizes(module: Any, name: str, before: Mapping[str, torch.Size]) -> None:
    """The number of features that a module holds beside its own tensors, where they agree on it."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    pairs = {
        pair
        for attribute, tensor in own
        for pair in zip(before.get(f"{name}.{attribute}", ()), tensor.shape, strict=False)
    }
    for attribute in _FEATURES:
        sizes = {new for old, new in pairs if old == vars(module).get(attribute)}
        if len(sizes) == 1:
            setattr(module, attribute, sizes.pop())


def sizes_of_linears(model: nn.Module) -> dict[str, int]:
    """The number of outputs of each Linear, by name."""
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes[name] = module.out_features
        elif hasattr(module, "nf") and hasattr(module, "nx"):
            sizes[name] = int(module.nf)
    return sizes


def mend_written_sizes(model: nn.Module, before: dict[str, int]) -> None:
    """Numbers of heads and widths that modules hold as attributes, beside their Linear layers."""
    after = sizes_of_linears(model)
    by_owner: dict[str, dict[str, tuple[int, int]]] = {}
    for name, size in before.items():
        owner_name, _, attribute = name.rpartition(".")
        by_owner.setdefault(owner_name, {})[attribute] = (size, after[name])
    for owner_name, linears in by_owner.items():
        owner: Any = model.get_submodule(owner_name)
        for attributes, pattern in ((_HEADS, _QUERIES), (_KEY_HEADS, _KEYS)):
            sizes = [size for name, size in linears.items() if pattern.search(name)]
            for attribute in attributes:
                heads = vars(owner).get(attribute)
                if sizes and isinstance(heads, int) and heads > 0 and sizes[0][0] % heads == 0:
                    old, new = sizes[0]
                    setattr(owner, attribute, new * heads // old)
        part = vars(owner).get("split_size")  # one Linear computes several parts of it
        parts = {
            new * part // old
            for old, new in linears.values()
            if part and old != new and old % part == new * part % old == 0
        }
        if len(parts) == 1:
            owner.split_size = parts.pop()
        for attribute in _WIDTHS:
            for old, new in linears.values():
                if vars(owner).get(attribute) == old != new:
                    setattr(owner, attribute, new)
