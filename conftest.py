"""The README's blocks are tests: they run from top to bottom, each seeing the names before it."""

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md"],
    setup=lambda namespace: torch.manual_seed(0),
).pytest()
