"""The features that the model returns are cut too, against the large network with k set."""

import dataclasses
import re

import pytest
import torch
from helpers.oracle import assert_same, chain, masked, snapshot
from torch import nn
from torch.nn.functional import glu, normalize
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import taildropout as td
from taildropout import PruningError, TailDropout

N, K = 8, 3


class Returns(nn.Module):
    """What it returns is a function of the module and the input."""

    def __init__(self, returns):
        super().__init__()
        self.returns = returns
        self.encode, self.other = nn.Linear(6, N), nn.Linear(6, N)
        self.tail = TailDropout()
        self.decode = nn.Linear(N, N)
        self.norm = nn.LayerNorm(N)
        self.scale = nn.Parameter(torch.randn(N))
        self.gru = nn.GRU(6, N, batch_first=True)

    def z(self, x):
        return self.tail(self.encode(x))

    def forward(self, x):
        return self.returns(self, x)


def inputs(samples):
    return torch.randn(samples, 6, dtype=torch.float64)


def pruned(model, k=K):
    return td.prune(model, {"tail": k}, inputs(3), outputs=True).eval()


PREFIXES = {
    "the layer last": lambda m, x: m.z(x),
    "normalize": lambda m, x: normalize(m.z(x), dim=-1),
    "an activation": lambda m, x: m.z(x).tanh().relu(),
    "a scale": lambda m, x: m.z(x) * m.scale,
    "a residual within the prefix": lambda m, x: m.z(x) + m.z(x).sin(),
    "gated by the whole": lambda m, x: m.z(x) * m.other(x).sigmoid(),
    "behind a GRU": lambda m, x: m.tail(m.gru(x[:, None])[0])[:, 0],
    "transposed": lambda m, x: m.z(x).unflatten(0, (-1, 1)).transpose(1, 2).flatten(1),
}


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("k", [1, K, N])
def test_the_model_returns_the_first_k_features(name, k):
    model = Returns(PREFIXES[name]).double()
    small = pruned(model, k)
    for samples in (1, 3, 7):
        x = inputs(samples)
        returned, expected = small(x), masked(model, {"tail": k}, x)
        assert returned.shape == (samples, k)
        assert not expected[:, k:].any()
        assert_close(returned, expected[:, :k], rtol=1e-10, atol=1e-12)


def test_what_computes_the_features_is_cut():
    for name in ("the layer last", "normalize", "a scale", "gated by the whole"):
        small = pruned(Returns(PREFIXES[name]).double())
        assert small.encode.out_features == K
        assert type(small.tail) is TailDropout  # nothing is left to slice or to fill up
    assert pruned(Returns(PREFIXES["a scale"]).double()).scale.shape == (K,)
    assert pruned(Returns(PREFIXES["gated by the whole"]).double()).other.out_features == K


def test_without_outputs_the_shape_stays():
    model = Returns(PREFIXES["the layer last"]).double()
    assert td.prune(model, K, inputs(3))(inputs(2)).shape == (2, N)


@dataclasses.dataclass
class Encoded:
    """A returned dataclass."""

    features: torch.Tensor
    rebuilt: torch.Tensor


torch.export.register_dataclass(Encoded)

STRUCTURES = {
    "a dict": (
        lambda m, x: {"rebuilt": m.decode(m.z(x)), "z": m.z(x), "n": 5},
        lambda r: (r["rebuilt"], r["z"]),
    ),
    "a tuple": (lambda m, x: (m.decode(m.z(x)), None, m.z(x)), lambda r: (r[0], r[2])),
    "a dataclass": (
        lambda m, x: Encoded(m.z(x), m.decode(m.z(x))),
        lambda r: (r.rebuilt, r.features),
    ),
    "nested": (
        lambda m, x: {"a": [m.decode(m.z(x)), {"b": m.z(x)}]},
        lambda r: (r["a"][0], r["a"][1]["b"]),
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_other_returned_values_keep_their_shape(name):
    returns, pick = STRUCTURES[name]
    model = Returns(returns).double()
    small, x = pruned(model), inputs(4)
    returned, whole = small(x), masked(model, {"tail": K}, x)
    assert type(returned) is type(whole)
    assert len(tree_leaves(returned)) == len(tree_leaves(whole))
    (rebuilt, z), (expected, whole_z) = pick(returned), pick(whole)
    assert_close(rebuilt, expected, rtol=1e-10, atol=1e-12)
    assert_close(z, whole_z[:, :K], rtol=1e-10, atol=1e-12)
    assert small.decode.in_features == K


def test_features_that_are_not_of_the_layer_stay_beside_it():
    model = Returns(lambda m, x: torch.cat([m.z(x), x, torch.zeros_like(x)], -1)).double()
    small, x = pruned(model), inputs(4)
    expected = masked(model, {"tail": K}, x)
    kept = [*range(K), *range(N, N + 12)]
    assert_close(small(x), expected[:, kept], rtol=1e-10, atol=1e-12)


def test_features_before_the_layer_stay():
    model = Returns(lambda m, x: (lambda h: (h, m.tail(h)))(m.encode(x))).double()
    small, x = pruned(model), inputs(4)
    (h, z), (whole, whole_z) = small(x), masked(model, {"tail": K}, x)
    assert_close(h, whole, rtol=1e-10, atol=1e-12)
    assert_close(z, whole_z[:, :K], rtol=1e-10, atol=1e-12)


def test_features_that_are_zero_in_the_prefix_stay():
    """A dead feature below k is one of the k."""
    model = chain(N).double()[:2]
    with torch.no_grad():
        model[0].weight[1] = model[0].bias[1] = 0
        model[0].weight[K - 1] = model[0].bias[K - 1] = 0
    x = torch.randn(4, 5, dtype=torch.float64)
    small = td.prune(model, K, x, outputs=True).eval()
    assert_close(small(x), masked(model, {"1": K}, x)[:, :K], rtol=1e-10, atol=1e-12)


def test_channels_of_images():
    conv, tail = nn.Conv2d(2, N, 3, padding=1), TailDropout(dropout_dim=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(N), tail, nn.ReLU(), nn.MaxPool2d(2)).double()
    small = td.prune(model, K, torch.randn(2, 2, 8, 8).double(), outputs=True).eval()
    x = torch.randn(3, 2, 10, 6).double()
    expected = masked(model, {"2": K}, x)
    assert_close(small(x), expected[:, :K], rtol=1e-10, atol=1e-12)


def test_flattened_channels_of_images():
    pool, tail = nn.AdaptiveAvgPool2d(3), TailDropout(dropout_dim=1)
    model = nn.Sequential(nn.Conv2d(2, N, 3), tail, pool, nn.Flatten()).double()
    small = td.prune(model, K, torch.randn(2, 2, 8, 8).double(), outputs=True).eval()
    x = torch.randn(3, 2, 10, 7).double()
    assert_close(small(x), masked(model, {"1": K}, x)[:, : K * 9], rtol=1e-10, atol=1e-12)


def test_a_layer_within_is_cut_as_ever():
    model = nn.Sequential(
        *(nn.Linear(5, 6), TailDropout(), nn.Sigmoid(), nn.Linear(6, N)),
        TailDropout(),
    ).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    ks = {"1": 2, "4": K}
    small = td.prune(model, ks, x, outputs=True).eval()
    assert (small[3].in_features, small[3].out_features) == (2, K)
    assert_close(small(x), masked(model, ks, x)[:, :K], rtol=1e-10, atol=1e-12)


def test_a_cut_network_that_fills_up_with_zeros_can_lose_them():
    model = chain(N).double()[:2]
    x = torch.randn(4, 5, dtype=torch.float64)
    filled = td.prune(model, 5, x)
    assert filled(x).shape == (4, N)
    for k in (5, K):
        small = td.prune(filled, k, x, outputs=True).eval()
        assert_close(small(x), masked(model, {"1": k}, x)[:, :k], rtol=1e-10, atol=1e-12)


REFUSED = {
    "LayerNorm": (
        lambda m, x: m.norm(m.z(x)),
        r"it returns none \(layer_norm in module 'norm' subtracts the mean over all n features",
    ),
    "softmax": (
        lambda m, x: m.z(x).softmax(-1),
        r"it returns none \(softmax .* needs all features",
    ),
    "within": (
        lambda m, x: m.decode(m.z(x)),
        "returns none: put the layer behind what is returned, or prune without",
    ),
    "another constant": (
        lambda m, x: m.z(x).sigmoid(),
        "but they stay: the output of the model has other features there than zeros",
    ),
    "a bias": (lambda m, x: m.z(x) + m.scale, "but they stay: the output .* other features there"),
    "a residual": (
        lambda m, x: m.other(x) + m.z(x),
        "but they stay: add in the model's own forward makes them differ from sample to sample",
    ),
    "another reader": (
        lambda m, x: (lambda z: {"z": z, "all": m.norm(z)})(m.z(x)),
        "but they stay: layer_norm in module 'norm' subtracts the mean over all n features",
    ),
    "a sigmoid beside it": (
        lambda m, x: (lambda z: torch.cat([z, z.sigmoid()], -1))(m.z(x)),
        "but they stay: the output of the model has other features there than zeros",
    ),
    "half of it gates the other": (
        lambda m, x: glu(torch.cat([m.other(x), m.z(x)], -1)[:, 4:12]),
        "but they stay: glu in the model's own forward joins them with others",
    ),
    "a size in the code": (lambda m, x: m.z(x).unflatten(-1, (2, 4)), "but they stay: unflatten"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_to_k_is_refused(name):
    returns, words = REFUSED[name]
    model, x = Returns(returns).double(), inputs(3)
    before = snapshot(model)
    with pytest.raises(PruningError, match=words):
        td.prune(model, {"tail": K}, x, outputs=True)
    assert_same(snapshot(model), before)


def test_the_plan_says_what_is_returned():
    model = Returns(STRUCTURES["a tuple"][0])
    plan = td.plan_pruning(model, K, torch.randn(3, 6), outputs=True)
    assert plan.outputs
    assert f"returned value 2 keeps {K} of {N} features along dim 1" in plan.summary()
    assert plan.at(5).output_cuts[0].keep == tuple(range(5))
    assert plan.at(5, outputs=False).output_cuts == []
    (point,) = plan.sweep([K], repeats=1).points
    assert point.parameters == sum(p.numel() for p in plan.apply(model).parameters())


def test_a_saved_encoder_returns_k_features(tmp_path):
    model, x = chain(N)[:2].eval(), torch.randn(4, 5)
    plan = td.plan_pruning(model, K, x, outputs=True)
    small, path = plan.apply(model), tmp_path / "small.safetensors"
    td.save_pruned(small, plan, path)
    loaded = td.load_pruned(chain(N)[:2].eval(), path)
    assert_close(loaded(x), small(x), rtol=0, atol=0)
    assert loaded(x).shape == (4, K)


# ------------------------------------------------------------------------ a wrong plan is caught


def with_keep(plan, keep):
    cuts = [dataclasses.replace(cut, keep=keep) for cut in plan.output_cuts]
    return dataclasses.replace(plan, output_cuts=cuts)


def test_what_goes_is_verified_to_be_zero():
    model = chain(N)[:2].double()
    plan = td.plan_pruning(model, K, torch.randn(4, 5).double(), outputs=True)
    words = "what goes from the output of the model must be zero, and with k set it is not"
    with pytest.raises(PruningError, match=re.escape(words)):
        with_keep(plan, (0, 1, K)).apply(model)


def test_what_stays_is_verified_to_be_the_prefix():
    model = chain(N)[:2].double()
    plan = td.plan_pruning(model, K, torch.randn(4, 5).double(), outputs=True)
    with pytest.raises(PruningError, match="but differs by up to"):
        with_keep(plan, (1, 0, 2)).apply(model)
    with pytest.raises(PruningError, match=r"has shape \(4, 3\) instead of \(4, 4\)"):
        with_keep(plan, (0, 1, 2, 3)).apply(model)
