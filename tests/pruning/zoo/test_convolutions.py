"""What networks of convolutions consist of."""

from helpers.zoo.checks import *
from helpers.zoo.convolutions import CASES
