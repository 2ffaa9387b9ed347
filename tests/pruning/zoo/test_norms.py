"""Norms in front of the layer, behind it, and along another dim."""

from helpers.zoo.checks import *
from helpers.zoo.norms import CASES
