"""Sums over features, and products that are no Linear's."""

from helpers.zoo.checks import *
from helpers.zoo.products import CASES
