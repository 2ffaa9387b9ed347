"""Whole networks of convolutions."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.convolutional_networks import CASES
from helpers.zoo.whole import *

pytestmark = pytest.mark.slow
