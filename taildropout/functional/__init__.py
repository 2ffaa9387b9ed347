"""Pure tensor functions: what the layers compute."""

from .dropout import tail_dropout
from .linear import expected_mse, prefix_linear, tail_linear
from .mlp import tail_mlp
from .prefix import keep_prefix

__all__ = [
    "expected_mse",
    "keep_prefix",
    "prefix_linear",
    "tail_dropout",
    "tail_linear",
    "tail_mlp",
]
