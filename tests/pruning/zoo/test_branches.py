"""Concatenations, residual branches, sums, tied weights: several readers, several writers."""

from helpers.zoo.branches import CASES
from helpers.zoo.checks import *
