"""Train once, choose the width later."""

from . import functional, lengths
from .layers import TailDropout

__version__ = "0.1.0"
__all__ = ["TailDropout", "functional", "lengths"]
