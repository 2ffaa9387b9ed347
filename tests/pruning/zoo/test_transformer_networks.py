"""Whole transformers, those of the library of that name."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.transformer_networks import CASES
from helpers.zoo.whole import *

pytestmark = pytest.mark.slow
