"""Modules with the names of the functions: they store arguments, and all that a pickle holds is here."""

from .dropout import TailDropout
from .linear import TailLinear
from .mlp import TailMLP

__all__ = ["TailDropout", "TailLinear", "TailMLP"]
