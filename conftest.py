"""Blocks of the README and of the docs are tests: on a page, each sees the names before it."""

import logging

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# Else pytest listens to it, and torch tells it all that it traces, which takes a tenth of the time.
logging.getLogger("torch.__trace").propagate = True

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
    setup=lambda namespace: torch.manual_seed(0),
).pytest()
