"""What every test file uses: a seed, a fresh compiler, and one test of drawn ks against a pmf."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import settings

settings.register_profile("taildropout", deadline=None, derandomize=True)
settings.load_profile("taildropout")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled by another test is left over, and nothing is left for the next one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What compiles is slow."""
    for item in items:
        if "fresh_compiler" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def assert_drawn_from():
    """Chi-square test: `assert_drawn_from(ks, pmf)`."""

    def check(k, pmf):
        pmf = np.asarray(pmf)
        observed = np.bincount(np.asarray(k), minlength=len(pmf))
        assert len(observed) == len(pmf)
        assert observed[pmf == 0].sum() == 0
        cells = pooled(observed, observed.sum() * pmf)
        assert scipy.stats.chisquare(*cells).pvalue > 1e-4

    return check


def pooled(observed, expected, at_least=5):
    """Neighbouring cells merged until each is expected often enough for a chi-square test."""
    cells = [[0.0, 0.0]]
    for cell in zip(observed, expected, strict=True):
        if cells[-1][1] >= at_least:
            cells.append([0.0, 0.0])
        cells[-1] = [a + b for a, b in zip(cells[-1], cell, strict=True)]
    if cells[-1][1] < at_least:
        rest = cells.pop()
        cells[-1] = [a + b for a, b in zip(cells[-1], rest, strict=True)]
    return tuple(zip(*cells, strict=True))
