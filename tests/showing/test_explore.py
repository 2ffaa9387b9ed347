import pytest
import torch
from sklearn.metrics import roc_auc_score

from taildropout.showing.explore import separation


@pytest.mark.parametrize("seed", range(5))
def test_separation_is_the_area_under_the_roc_curve(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 6, (size,), generator=generator) for size in (30, 20))  # with ties
    area = roc_auc_score([1] * 30 + [0] * 20, torch.cat([a, b]).numpy())
    assert separation(a, b) == pytest.approx(max(area, 1 - area))
