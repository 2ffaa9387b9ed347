"""Whole networks, small: a tagger, attention, recommenders."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.other_networks import CASES
from helpers.zoo.whole import *

pytestmark = pytest.mark.slow
