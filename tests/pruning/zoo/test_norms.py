"""Norms in front of the layer, behind it, and along another dim."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.norms import CASES

pytestmark = pytest.mark.slow
