"""Cutting a network to the width that was chosen, exactly.

`analysis` reads from `torch.export` which features of which value can go; `surgery` cuts the
user's own modules accordingly; `plan` is the record of it: made, applied, verified, saved, loaded.
"""

from .graph import PruningError
from .plan import PrunePlan, load_pruned, plan_pruning, prune, save_pruned

__all__ = ["PrunePlan", "PruningError", "load_pruned", "plan_pruning", "prune", "save_pruned"]
