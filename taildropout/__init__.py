"""Train once, choose the width later."""

from . import draws, functional, lengths
from .layers import TailDropout, TailLinear, TailMLP
from .losses import PrefixLoss
from .measuring.curve import Scree
from .measuring.live import LiveScree
from .measuring.scree import scree
from .models.copies import PruningError
from .models.insert import insert, insert_each, remove, replace_dropout, tail_dropouts
from .models.together import DrawnTogether, draw_together
from .models.width import Choice, ChosenWidth, at_width
from .pruning.budget import WidthPath, WidthStep, choose_widths
from .pruning.elastic import Elastic
from .pruning.finalize import finalize
from .pruning.nest import Nested, Place, Places, nest, places
from .pruning.order import OrderedPlace, OrderPlan, order, plan_ordering
from .pruning.plan import PrunePlan, plan_pruning, prune
from .pruning.recalibrate import recalibrate
from .pruning.schedule import Schedule
from .pruning.sweep import Sweep, SweepPoint
from .shipping.elastic_file import Menu, MenuItem, describe, load_width, save_elastic
from .shipping.pruned import load_pruned, save_pruned
from .showing.report import report

__version__ = "0.1.0"
# fmt: off
__all__ = ["Choice", "ChosenWidth", "DrawnTogether", "Elastic", "LiveScree", "Menu", "MenuItem", "Nested", "OrderPlan", "OrderedPlace", "Place", "Places", "PrefixLoss", "PrunePlan", "PruningError", "Schedule", "Scree", "Sweep",
    "SweepPoint", "TailDropout", "TailLinear", "TailMLP", "WidthPath", "WidthStep", "at_width", "choose_widths", "describe", "draw_together", "draws", "finalize", "functional", "insert", "insert_each", "lengths", "load_pruned",
    "load_width", "nest", "order", "places", "plan_ordering", "plan_pruning", "prune", "recalibrate", "remove", "replace_dropout", "report", "save_elastic", "save_pruned", "scree", "tail_dropouts"]
