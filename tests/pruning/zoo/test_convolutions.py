"""What networks of convolutions consist of."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.convolutions import CASES

pytestmark = pytest.mark.slow
