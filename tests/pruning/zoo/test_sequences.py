"""What networks for sequences consist of: recurrent modules and cells, attention."""

from helpers.zoo.checks import *
from helpers.zoo.sequences import CASES
