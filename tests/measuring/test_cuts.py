"""Other features than the first k: against features that are cut by hand between two halves."""

import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout
from taildropout.measuring.cuts import Random
from taildropout.showing.plot import plot_scree

N = 6
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


class Halves(nn.Module):
    """What is in front of the layer, and what comes behind; `behind` may look past the layer."""

    def __init__(self, front, layer, behind):
        super().__init__()
        self.front, self.layer, self.behind = front, layer, behind

    def forward(self, x):
        return self.behind(self.layer(self.front(x)))


class Residual(Halves):
    def forward(self, x):
        h = self.front(x)
        return self.behind(h + self.layer(h.tanh()))


class Twice(Halves):
    def forward(self, x):
        h = self.front(x)
        return self.behind(self.layer(h) * self.layer(h.exp()))


def linear_reader():
    front, behind = nn.Sequential(nn.Linear(4, N), nn.Tanh()), nn.Linear(N, 3)
    return Halves(front, TailDropout(), behind), (4,), (3,)


def activation_reader():
    front, behind = nn.Linear(4, N), nn.Sequential(nn.Sigmoid(), nn.Linear(N, 3, bias=False))
    return Halves(front, TailDropout(), behind), (4,), (3,)


def tokens():
    return Halves(nn.Linear(4, N), TailDropout(), nn.Linear(N, 3)), (5, 4), (5, 3)


def channels():
    front, behind = nn.Conv2d(2, N, 3), nn.Conv2d(N, 3, 3)
    return Halves(front, TailDropout(dropout_dim=1), behind), (2, 6, 6), (3, 2, 2)


def residual():
    return Residual(nn.Linear(4, N), TailDropout(), nn.Linear(N, 3)), (4,), (3,)


def twice():
    return Twice(nn.Linear(4, N), TailDropout(), nn.Linear(N, 3)), (4,), (3,)


NETWORKS = [linear_reader, activation_reader, tokens, channels, residual, twice]


def measured(network, sizes=(8, 5, 7)):
    model, inputs, outputs = network()
    data = [(torch.randn(b, *inputs).double(), torch.randn(b, *outputs).double()) for b in sizes]
    return model.double().eval(), data


def loss(output, target):
    return (output - target).square().flatten(1).mean(1)


class ByHand(nn.Module):
    """In place of the layer: a function of rows of features."""

    def __init__(self, function, dim):
        super().__init__()
        self.function, self.dim = function, dim

    def forward(self, x):
        moved = x.movedim(self.dim, -1)
        rows = moved.reshape(-1, moved.shape[-1]).numpy()
        return torch.tensor(self.function(rows)).reshape(moved.shape).movedim(-1, self.dim)


@torch.no_grad()
def losses_by_hand(model, functions, data):
    layer, rows = model.layer, []
    for function in functions:
        model.layer = ByHand(function, layer.dropout_dim)
        rows.append(torch.cat([loss(model(x), y) for x, y in data]))
    model.layer = layer
    return torch.stack(rows)


@torch.no_grad()
def features_of(model, data):
    seen = []

    def look(module, args, output):
        seen.append(output.movedim(module.dropout_dim, -1).flatten(0, -2))

    with model.layer.register_forward_hook(look):
        for x, _ in data:
            model(x)
    return torch.cat(seen).numpy()


def assert_measures(result, losses):
    assert_close(result.loss, losses.mean(1), **TOLERANCE)
    assert_close(result.cov, torch.cov(losses), **TOLERANCE)


@pytest.mark.parametrize("memory", [2**30, 3_000])
@pytest.mark.parametrize("network", NETWORKS)
def test_principal_components_are_those_of_the_features_over_all_data(network, memory):
    model, data = measured(network)
    result = td.scree(model, loss, data, features="principal", progress=False, memory=memory)
    seen = features_of(model, data)

    def projected(k):
        pca = PCA(N).fit(seen)
        pca.components_ = pca.components_[:k]
        return lambda rows: (rows - pca.mean_) @ pca.components_.T @ pca.components_ + pca.mean_

    assert result.ks == list(range(N + 1))
    assert_measures(result, losses_by_hand(model, [projected(k) for k in result.ks], data))


@pytest.mark.parametrize("memory", [2**30, 3_000])
@pytest.mark.parametrize("network", NETWORKS)
def test_random_features_are_the_first_in_an_order_of_their_own(network, memory):
    model, data = measured(network)
    before = torch.get_rng_state()
    result = td.scree(model, loss, data, features="random", progress=False, memory=memory)
    assert_close(torch.get_rng_state(), before)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).numpy()
    assert order.tolist() != list(range(N))

    def masked(k):
        return lambda rows: np.where(np.isin(np.arange(N), order[:k]), rows, 0)

    assert_measures(result, losses_by_hand(model, [masked(k) for k in result.ks], data))


@pytest.mark.parametrize("network", NETWORKS)
def test_at_full_width_all_are_the_network_itself(network):
    model, data = measured(network)
    with torch.no_grad():
        expected = torch.cat([loss(model(x), y) for x, y in data]).mean()
    for features in ("first", "random", "principal"):
        result = td.scree(model, loss, data, features=features, progress=False)
        assert_close(result.loss[-1], expected, **TOLERANCE)


def test_a_network_that_was_trained_without_the_layer():
    """In another basis it loses nothing at k = 2, which neither the first nor random ones say."""
    rotation = torch.linalg.qr(torch.randn(N, N)).Q
    model = nn.Sequential(nn.Linear(4, N), nn.Linear(N, 3))
    with torch.no_grad():
        model[0].weight.copy_(rotation[:, :2] @ torch.randn(2, 4))
    inputs = torch.randn(50, 4)
    data = [(inputs, model(inputs).detach())]
    td.insert(model, "0", TailDropout())
    first, random, principal = (
        td.scree(model, nn.MSELoss(), data, features=features, progress=False)
        for features in ("first", "random", "principal")
    )
    assert principal.loss[2] < 1e-10
    assert min(first.loss[2], random.loss[2]) > 1e-3
    assert principal.loss[1] < principal.loss[0]


@pytest.mark.parametrize("features", ["random", "principal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", [linear_reader, activation_reader])
def test_models_of_low_precision(network, dtype, features):
    model, data = measured(network)
    expected = td.scree(model, loss, data, features=features, progress=False)
    low = [(inputs.to(dtype), target) for inputs, target in data]
    result = td.scree(model.to(dtype), loss, low, features=features, progress=False)
    assert_close(result.loss, expected.loss, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_what_does_not_matter_may_be_nan():
    kept = Random(dim=-1, n=4).keep(torch.full((2, 4), torch.nan), 0)
    assert_close(kept, torch.zeros(2, 4), rtol=0, atol=0)


@pytest.mark.parametrize("side", ["in front", "behind"])
def test_the_layer_of_a_pruned_network_that_adds_zeros(side):
    """A random order is one of the features that are left."""
    between = [nn.LayerNorm(N)]
    model = nn.Sequential(
        nn.Linear(4, N),
        *(between if side == "in front" else []),
        TailDropout(),
        *(between if side == "behind" else []),
        nn.Linear(N, 3),
    )
    data = [(torch.randn(8, 4), torch.randn(8, 3))]
    small = td.prune(model, 4, data[0][0])
    first = td.scree(small, nn.MSELoss(), data, progress=False)
    for features in ("random", "principal"):
        result = td.scree(small, nn.MSELoss(), data, features=features, progress=False)
        assert result.ks == [0, 1, 2, 3, 4]
        assert_close(result.loss[-1], first.loss[-1], rtol=1e-5, atol=0)
        assert not torch.allclose(result.loss[1:-1], first.loss[1:-1])


# --- what the result is good for ----------------------------------------------------------------


def scree_of(features):
    losses = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    return td.Scree("layer", [0, 3, 6], losses, 100, torch.eye(3).double() / 100, features)


def test_the_result_knows_which_features_it_is_of():
    model, data = measured(linear_reader)
    result = td.scree(model, loss, data, features="principal", progress=False)
    assert result.features == "principal"
    again = td.Scree.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.features == "principal"
    written_before = {k: v for k, v in scree_of("first").to_dict().items() if k != "features"}
    assert td.Scree.from_dict(written_before).features == "first"


@pytest.mark.parametrize("features", ["random", "principal"])
def test_nothing_is_pruned_to_other_features_than_the_first(features):
    model, data = measured(linear_reader)
    scree = scree_of(features)
    for k in (scree.choose(0.5), scree.one_standard_error()):
        assert (k, k.features) == (3, features)
        words = rf"first features, got k=3 {features} ones for layer 'layer': choose .*first"
        for widths in (k, {"layer": k}):
            with pytest.raises(ValueError, match=words):
                td.prune(model, widths, data[0][0])
            with pytest.raises(ValueError, match=words), td.at_width(model, widths):
                pass
    losses = torch.tensor([8.0, 2.0, 1.5, 1.2, 1.0]).double()
    knee = td.Scree("layer", list(range(5)), losses, 9, torch.eye(5).double(), features).knee()
    assert (knee, knee.features) == (1, features)
    assert td.scree(model, loss, data, ks=[k, 6], progress=False).ks == [3, 6]
    sweep = td.plan_pruning(model, 3, data[0][0]).sweep([3, 6])
    with pytest.raises(ValueError, match=f"features=\"first\", got '{features}'"):
        sweep.table(scree)
    with pytest.raises(ValueError, match=f"features=\"first\", got '{features}'"):
        td.report(None, scree, None, "report.html")


def test_the_plot_says_which_features_they_are():
    _, ax = plot_scree(scree_of("first"))
    assert (ax.get_xlabel(), ax.get_legend()) == ("k, features kept", None)
    plot_scree(scree_of("random"), ax=ax)
    plot_scree(scree_of("principal"), ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "random features",
        "principal components",
    ]
    assert ax.get_xlabel() == "k, features kept"
    _, ax = plot_scree(scree_of("principal"), label="PCA")
    assert ax.get_xlabel() == "k, principal components kept"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["PCA"]


@pytest.mark.parametrize(
    ("features", "data", "words"),
    [
        ("last", [], r"one of \('first', 'random', 'principal'\), got 'last'"),
        ("principal", iter([]), "twice.*list or DataLoader, got a list_iterator"),
        ("principal", [], "at least one sample, got none"),
    ],
)
def test_bad_arguments_are_refused(features, data, words):
    model, _ = measured(linear_reader)
    with pytest.raises(ValueError, match=words):
        td.scree(model, loss, data, features=features, progress=False)
