"""Whole networks, small: a tagger, attention, recommenders."""

from helpers.zoo.checks import *
from helpers.zoo.other_networks import CASES
from helpers.zoo.whole import *
