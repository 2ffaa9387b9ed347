"""Elementwise functions with parameters, gates, copies and fillings."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.gates import CASES

pytestmark = pytest.mark.slow  # many alike
