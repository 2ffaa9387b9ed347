"""Train once, choose the width later."""

from . import functional, lengths
from .insert import insert, remove, replace_dropout, tail_dropouts
from .layers import TailDropout, TailMLP
from .pruning import PrunePlan, PruningError, load_pruned, plan_pruning, prune, save_pruned
from .report import report
from .scree import LiveScree, Scree, scree
from .widths import WidthPath, choose_widths

__version__ = "0.1.0"
# fmt: off
__all__ = [
    "LiveScree", "PrunePlan", "PruningError", "Scree", "TailDropout", "TailMLP", "WidthPath",
    "choose_widths", "functional", "insert", "lengths", "load_pruned", "plan_pruning", "prune",
    "remove", "replace_dropout", "report", "save_pruned", "scree", "tail_dropouts",
]
