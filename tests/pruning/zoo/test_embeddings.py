"""Embeddings and what compares them: similarities, inner products."""

import pytest
from helpers.zoo.checks import *
from helpers.zoo.embeddings import CASES

pytestmark = pytest.mark.slow
