"""What networks for sequences consist of: recurrent modules and cells, attention."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.sequences import CASES

pytestmark = pytest.mark.slow
