"""Elementwise functions with parameters, gates, copies and fillings."""

from helpers.zoo.checks import *
from helpers.zoo.gates import CASES
