"""LiveScree against numpy on the list of all losses."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import LiveScree, TailDropout, TailMLP

N = 4


def simulate(live, layer, sizes):
    """Updates with random losses; the ks, losses and update numbers as flat arrays."""
    ks, losses, updates = [], [], []
    for update, size in enumerate(sizes):
        layer(torch.ones(size, N))
        loss = torch.randn(size, dtype=torch.float64) + 10 * layer.drawn_k
        live.update(loss)
        ks.append(layer.drawn_k.numpy())
        losses.append(loss.numpy())
        updates.append(np.full(size, update))
    return np.concatenate(ks), np.concatenate(losses), np.concatenate(updates)


@pytest.mark.parametrize("sizes", [(50,), (30, 1, 40, 0, 7), (5,) * 40])
def test_mean_and_standard_error_of_each_k(sizes):
    layer = TailDropout()
    live = LiveScree(layer)
    ks, losses, _ = simulate(live, layer, sizes)
    result = live.result()
    assert result.ks == sorted(set(ks.tolist()))
    assert result.count == sum(sizes)
    for k, mean, stderr in zip(result.ks, result.loss, result.stderr, strict=True):
        of_k = losses[ks == k]
        assert mean.item() == pytest.approx(of_k.mean())
        assert stderr.item() == pytest.approx(of_k.std(ddof=1) / len(of_k) ** 0.5)


def test_with_a_half_life_old_losses_fade():
    layer = TailDropout()
    live = LiveScree(layer, half_life=3)
    ks, losses, updates = simulate(live, layer, (40,) * 10)
    weights = 0.5 ** ((9 - updates) / 3)
    result = live.result()
    for k, mean, stderr in zip(result.ks, result.loss, result.stderr, strict=True):
        w, y = weights[ks == k], losses[ks == k]
        expected = np.average(y, weights=w)
        variance = (w * (y - expected) ** 2).sum() / (w.sum() - (w**2).sum() / w.sum())
        assert mean.item() == pytest.approx(expected)
        assert stderr.item() == pytest.approx((variance * (w**2).sum()) ** 0.5 / w.sum())


def test_memory_does_not_grow():
    layer = TailDropout()
    live = LiveScree(layer)
    simulate(live, layer, (100,) * 3)
    before = live._bins.shape
    simulate(live, layer, (100,) * 30)
    assert live._bins.shape == before


def test_it_agrees_with_scree_where_the_network_stands_still():
    """A learning rate of 0, and k = n as often as everything else: within five standard errors."""
    model = nn.Sequential(
        nn.Linear(6, 8), TailDropout(lengths=td.lengths.Uniform(0)), nn.Linear(8, 1)
    )
    x, y = torch.randn(20_000, 6), torch.randn(20_000)
    live = LiveScree(model[1])
    with torch.no_grad():
        for batch, target in zip(x.split(500), y.split(500), strict=True):
            live.update((model(batch)[:, 0] - target).square())
    exact = td.scree(model, lambda o, t: (o[:, 0] - t).square(), [(x, y)], progress=False)
    actual = live.result()
    assert actual.ks == exact.ks
    assert ((actual.loss - exact.loss).abs() < 5 * actual.stderr).all()


def test_a_tail_mlp_is_watched_by_its_dropout():
    mlp = TailMLP(3, N)
    live = LiveScree(mlp)
    mlp(torch.randn(30, 3))
    live.update(mlp.dropout.drawn_k.float())
    result = live.result()
    assert_close(result.loss, torch.tensor(result.ks).double())


def test_a_model_with_one_layer_is_watched_by_it():
    model = nn.Sequential(nn.Linear(3, N), nn.Sequential(TailDropout()))
    assert LiveScree(model).layers == [model[1][0]]
    with pytest.raises(ValueError, match=r"one of the model's .* \['1.0', '2'\], got None"):
        LiveScree(model.append(TailDropout()))
    with pytest.raises(ValueError, match="must contain a TailDropout layer"):
        LiveScree(nn.Linear(2, 2))


def test_one_k_per_token():
    layer = TailDropout(batch_dim=(0, 1))
    live = LiveScree(layer)
    layer(torch.ones(5, 6, N))
    live.update(layer.drawn_k.double())
    assert live.result().count == 30
    assert_close(live.result().loss, torch.tensor(live.result().ks).double())


def test_a_k_that_occurred_once_has_no_standard_error():
    layer = TailDropout()
    live = LiveScree(layer)
    layer(torch.ones(1, N))
    live.update(torch.ones(1))
    assert live.result().stderr.isnan().all()


def test_what_cannot_be_taken_in_is_refused():
    layer = TailDropout()
    live = LiveScree(layer)
    with pytest.raises(ValueError, match="there is no loss yet"):
        live.result()
    with pytest.raises(RuntimeError, match="must have drawn a k since"):
        live.update(torch.ones(3))
    layer(torch.ones(3, N))
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(\)"):
        live.update(torch.ones(()))
    with pytest.raises(ValueError, match="must be finite"):
        live.update(torch.tensor([1.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match="half_life must be above 0 updates, got 0"):
        LiveScree(layer, half_life=0)


def test_losses_of_an_evaluation_or_of_the_same_batch_again_are_refused():
    layer = TailDropout()
    live = LiveScree(layer)
    layer(torch.ones(3, N))
    live.update(torch.ones(3))
    with pytest.raises(RuntimeError, match="drawn a k since the last update"):
        live.update(torch.ones(3))
    layer.eval()(torch.ones(3, N))
    with pytest.raises(RuntimeError, match="in training, and the layer is in eval"):
        live.update(torch.ones(3))


# --- a network that is drawn together ------------------------------------------------------------


def network(lengths):
    model = nn.Sequential(
        TailDropout(lengths=lengths), nn.Linear(8, 40), TailDropout(lengths=lengths)
    )
    td.draw_together(model)
    return model


def test_a_network_is_measured_by_its_width():
    model = network(td.lengths.Uniform(0))
    live = LiveScree(model)
    ks, losses = [], []
    for _ in range(20):
        model(torch.randn(50, 8))
        loss = torch.randn(50).double() + model[2].drawn_k
        live.update(loss)
        ks.append(model[2].drawn_k)
        losses.append(loss)
    result, ks, losses = live.result(), torch.cat(ks), torch.cat(losses)
    assert (result.layer, result.count) == ("*", 1000)
    assert result.ks == [i / 32 for i in range(33)]
    for width, mean in zip(result.ks, result.loss, strict=True):
        near = (ks / 40 - width).abs() < 1 / 32
        assert losses[near].min() <= mean <= losses[near].max()
        assert mean.item() == pytest.approx(40 * width, abs=1.5)


def test_with_the_features_of_a_layer_it_is_that_layers_curve():
    model = network(None)
    live, alone = LiveScree(model, features=40), LiveScree(model[2])
    for size in (20, 30):
        model(torch.randn(size, 8))
        loss = torch.randn(size)
        live.update(loss)
        alone.update(loss)
    actual, expected = live.result(), alone.result()
    assert actual.ks == [k / 40 for k in expected.ks]
    assert_close(actual.loss, expected.loss)
    assert_close(actual.cov, expected.cov, equal_nan=True)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_network_is_measured_by_its_width():
    model = network(td.lengths.Uniform(0))
    live, alone = LiveScree(model), LiveScree(model[2])
    fast = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(5):
        model[1].weight.data.fill_(0)
        model[1].bias.data.fill_(1)
        k = fast(torch.randn(500, 8)).sum(1)
        live.update(k)
        with pytest.raises(RuntimeError, match="In compiled code a layer does not keep it"):
            alone.update(k)
    result = live.result()
    assert_close(result.loss, 40 * torch.tensor(result.ks).double(), rtol=0, atol=1.25)


def test_a_network_without_one_width_is_refused():
    apart = nn.Sequential(TailDropout(), TailDropout())
    with pytest.raises(ValueError, match="one of the model's"):
        LiveScree(apart)
    td.draw_together(apart, "0")
    with pytest.raises(ValueError, match="one of the model's"):
        LiveScree(apart)
    with pytest.raises(ValueError, match="drawn together: draw_together"):
        LiveScree(TailDropout(), features=8)
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        LiveScree(apart[0], features=0)
    td.draw_together(apart)
    live = LiveScree(apart)
    with pytest.raises(RuntimeError, match="drawn a k since"):
        live.update(torch.ones(3))
    apart[1].p = 0.2
    apart(torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"equal lengths .*Exponential\(p=0.5.*p=0.2"):
        live.update(torch.ones(3))
