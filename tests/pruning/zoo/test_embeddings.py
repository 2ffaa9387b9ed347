"""Embeddings and what compares them: similarities, inner products."""

from helpers.zoo.checks import *
from helpers.zoo.embeddings import CASES
