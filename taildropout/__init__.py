"""Train once, choose the width later."""

from . import functional, lengths
from .insert import tail_dropouts
from .layers import TailDropout, TailMLP
from .pruning import PrunePlan, PruningError, load_pruned, plan_pruning, prune, save_pruned
from .scree import LiveScree, Scree, scree

__version__ = "0.1.0"
__all__ = [
    "LiveScree",
    "PrunePlan",
    "PruningError",
    "Scree",
    "TailDropout",
    "TailMLP",
    "functional",
    "lengths",
    "load_pruned",
    "plan_pruning",
    "prune",
    "save_pruned",
    "scree",
    "tail_dropouts",
]
