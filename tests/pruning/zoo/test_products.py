"""Sums over features, and products that are no Linear's."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.products import CASES

pytestmark = pytest.mark.slow
