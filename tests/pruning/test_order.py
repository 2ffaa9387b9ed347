"""Features rearranged: the same outputs, what matters first, and training that goes on."""

import copy
import itertools

import pytest
import torch
from helpers.families import DECODERS
from helpers.oracle import as_trained, assert_same, snapshot
from helpers.zoo.case import Wired
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout, lengths
from taildropout.models.copies import without_cache
from taildropout.models.inputs import call
from taildropout.pruning import rearrange as rearranging
from taildropout.pruning.precision import InFloat64

# ------------------------------------------------------------------------ outputs are unchanged


def mlp(n=6):
    return nn.Sequential(nn.Linear(5, n), nn.GELU(), TailDropout(), nn.Linear(n, 3))


def bottleneck():
    return nn.Sequential(nn.Linear(5, 6), TailDropout(), nn.Linear(6, 3))


def conv_net():
    """BatchNorm, depthwise and grouped convolutions, and a Linear that reads channels' positions."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), TailDropout(dropout_dim=1)),
        *(nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 8, 1), nn.ReLU()),
        *(TailDropout(dropout_dim=1), nn.Conv2d(8, 8, 1, groups=4), nn.Sigmoid()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), TailDropout(), nn.Linear(32, 3)),
    )


def gated(m, x):
    gate, up = m.up(x).chunk(2, -1)
    return m.down(m.tail(F.silu(gate) * up * m.scale.weight))


def gated_mlp():
    parts = {"up": nn.Linear(5, 12), "down": nn.Linear(6, 3), "tail": TailDropout()}
    return Wired(gated, **parts, scale=nn.Linear(6, 1, False))


def attend(m, x):
    q, k, v = (y.unflatten(-1, (-1, 3)).transpose(1, 2) for y in m.qkv(x).split([12, 6, 6], -1))
    heads = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return m.o(m.tail(heads.transpose(1, 2).flatten(2)))


def grouped_heads():
    """Four heads of 3, two of which share keys and values."""
    parts = {"qkv": nn.Linear(5, 24), "o": nn.Linear(12, 3), "tail": TailDropout(multiple_of=3)}
    return Wired(attend, **parts)


def tied(m, x):
    return F.linear(m.tail(m.a(x)), m.a.weight.T) + m.b(m.tail2(m.a(x).tanh()))


def tied_autoencoder():
    """One weight computes the features and reads them; so does another layer, behind a tanh."""
    parts = {"a": nn.Linear(5, 6), "b": nn.Linear(6, 5), "tail": TailDropout()}
    return Wired(tied, **parts, tail2=TailDropout())


def embedded():
    """Vectors of words and of places are added up: linear still."""
    return Wired(
        lambda m, x: m.b(m.tail(m.a(x) + m.p(x)).mean(1)),
        a=nn.Embedding(9, 6),
        p=nn.Embedding(9, 6),
        b=nn.Linear(6, 3),
        tail=TailDropout(),
    )


def weight_normed():
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(first, nn.ReLU(), TailDropout(), nn.Linear(6, 3))


def words(*shape):
    return torch.randint(9, shape)


def pixels(*shape):
    return torch.randn(*shape, dtype=torch.float64)


NETS = {
    "MLP": (mlp, pixels, [(8, 5), (1, 5), (3, 7, 5)], {"2": "permutation"}),
    "bottleneck": (bottleneck, pixels, [(8, 5), (1, 5), (3, 7, 5)], {"1": "rotation"}),
    "CNN": (
        conv_net,
        pixels,
        [(8, 1, 9, 9), (1, 1, 6, 11)],
        {"3": "permutation", "7": "permutation in blocks of 2"},
    ),
    "gated": (gated_mlp, pixels, [(8, 5), (3, 7, 5)], {"tail": "permutation"}),
    "heads": (
        grouped_heads,
        pixels,
        [(8, 4, 5), (1, 9, 5)],
        {"tail": "permutation in blocks of 6"},
    ),
    "tied": (tied_autoencoder, pixels, [(8, 5), (1, 5)], {"tail": "permutation"}),
    "embedding": (embedded, words, [(8, 4), (1, 9)], {"tail": "rotation"}),
    "weight norm": (weight_normed, pixels, [(8, 5), (1, 5)], {"2": "permutation"}),
}


def passed_by(model, name, inputs):
    """What a layer hands on, and what the model returns."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        output = call(model, inputs)
    handle.remove()
    return seen[0], output


def in_new_order(features, place, dim):
    if place.how == "rotation":
        return (features.movedim(dim, -1) @ place.by).movedim(-1, dim)
    return features.index_select(dim, place.by)


@pytest.mark.parametrize("name", NETS)
def test_the_features_change_places_and_nothing_else(name):
    make, values, shapes, how = NETS[name]
    model = as_trained(make()).double().train()
    data = [values(*shapes[0])]
    before = snapshot(model)
    plan = td.plan_ordering(model, data)
    ordered = plan.apply(model)
    assert_same(snapshot(model), before)
    blocks = {1: ""} | {m: f" in blocks of {m}" for m in range(2, 9)}
    assert {p.layers[0]: p.how + blocks[p.multiple_of] for p in plan.places} == how
    assert ordered.training
    for shape, place in itertools.product(shapes, plan.places):
        x = values(*shape)
        features, output = passed_by(model.eval(), place.layers[0], x)
        new, same = passed_by(ordered.eval(), place.layers[0], x)
        assert_close(same, output, rtol=1e-10, atol=1e-11)
        dim = model.get_submodule(place.layers[0]).dropout_dim
        assert_close(new, in_new_order(features, place, dim), rtol=1e-10, atol=1e-11)
        assert place.after >= place.before


@pytest.mark.parametrize(("family", "places"), [("Llama", 5), ("GPT-2", 4)])
def test_transformers_are_ordered_where_nest_puts_layers(family, places):
    """Heads with their keys and values, gated MLPs; with RMSNorm the residual stream, too."""
    family = DECODERS[family]
    model = without_cache(family.kind(family.config(24)).double().eval())
    as_trained(model)
    td.nest(model, family.arguments(), streams=True)
    plan = td.plan_ordering(model, [family.arguments() for _ in range(2)])
    assert len(plan.places) == places
    ordered = plan.apply(model)
    for length in (7, 1, 12):
        x = {"input_ids": torch.randint(3, 50, (2, length))}
        with InFloat64():
            same, output = call(ordered, x).logits, call(model, x).logits
        assert_close(same, output, rtol=1e-9, atol=1e-9)
    for place in plan.places:
        x = family.arguments()
        features, new = (passed_by(m, place.layers[0], x)[0] for m in (model, ordered))
        assert_close(new, in_new_order(features, place, -1), rtol=1e-4, atol=1e-4)
        assert not torch.equal(place.by, torch.arange(place.n))


def test_a_rotation_is_switched_off():
    (place,) = td.plan_ordering(bottleneck(), [torch.randn(8, 5)], rotate=False).places
    assert sorted(place.by.tolist()) == list(range(6))


def test_layers_of_the_same_features_have_one_order():
    plan = td.plan_ordering(tied_autoencoder(), [torch.randn(8, 5)])
    assert [place.layers for place in plan.places] == [("tail", "tail2")]


# --------------------------------------------------------------------------------- what is left


def sliced(m, x):
    h = m.tail(m.a(x))
    return m.b(h) + h[:, :3]


def with_lstm():
    return Wired(
        lambda m, x: m.b(m.tail(m.a(x)[0])),
        a=nn.LSTM(5, 6, batch_first=True),
        b=nn.Linear(6, 3),
        tail=TailDropout(),
    )


def trained_tail_linear():
    linear = td.TailLinear(6, 3)
    nn.init.ones_(linear.tail_bias)
    return nn.Sequential(nn.Linear(5, 6), linear)


def same_twice():
    return nn.Sequential(nn.Linear(5, 6), TailDropout(), nn.ReLU(), TailDropout(), nn.Linear(6, 3))


PARTS = {"a": nn.Linear(5, 6), "b": nn.Linear(6, 3), "tail": TailDropout()}
LEFT = {
    "recurrent": (with_lstm, "tail", "lstm in module 'a' computes all features together"),
    "returned": (lambda: nn.Sequential(nn.Linear(5, 6), TailDropout()), "1", "returns them"),
    "given": (lambda: nn.Sequential(TailDropout(), nn.Linear(5, 6)), "0", "gets them"),
    "by number": (lambda: Wired(sliced, **PARTS), "tail", "by their number|returns them"),
    "normalised": (
        lambda: nn.Sequential(nn.Linear(5, 6), TailDropout(), nn.LayerNorm(6), nn.Linear(6, 3)),
        "1",
        "layer_norm in module '2'",
    ),
    "never called": (
        lambda: Wired(lambda m, x: m.b(m.a(x)), **PARTS),
        "tail",
        "does not call it",
    ),
    "trained tail bias": (trained_tail_linear, "1.dropout", "a trained bias for each number"),
    "the same as others'": (same_twice, "1", "layer '3' has the same features"),
    "one": (lambda: mlp(1), "2", "one feature"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name):
    make, layer, words = LEFT[name]
    model, x = make().double(), torch.randn(4, 3, 5, dtype=torch.float64)
    x = x if name == "recurrent" else x[:, 0]
    plan = td.plan_ordering(model, [x], layer=layer)
    assert plan.places == ()
    assert list(plan.left) == [layer]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(plan.left[layer])
    assert f"left as it is, {layer}: {plan.left[layer]}" in str(plan)
    assert_same(snapshot(plan.apply(model))["values"], snapshot(model)["values"])


def test_what_is_joined_goes_by_its_parts():
    """Channels have positions behind a flatten; there the layer's features go along."""
    plan = td.plan_ordering(as_trained(conv_net()), [torch.randn(4, 1, 9, 9)])
    assert plan.left == {"12": "they go along with those of layer '7'"}


def test_features_of_a_plan_print_as_a_table():
    torch.manual_seed(0)
    lines = str(td.plan_ordering(mlp(), [torch.randn(8, 5)])).splitlines()
    assert lines[0] == "by variance: how much of it the first half of the features has"
    assert lines[1].split("  ")[0] == "layer"
    assert lines[2].startswith("2      6         permutation    ")
    assert lines[2].endswith("read by 3")


# -------------------------------------------------------------------------------- what matters


def brute_variance(model, x, y, layer):
    features = passed_by(model, layer, x)[0].flatten(0, -2)
    reads = model[-1].weight
    return [
        sum(float(h[j]) ** 2 * reads[:, j].square().sum().item() for h in features)
        for j in range(features.shape[1])
    ]


def brute_saliency(model, x, y, layer):
    """Sample by sample, and feature by feature, by a factor on the feature at all positions."""
    totals = []
    for j in range(6):
        total = 0.0
        for one, target in zip(x, y, strict=True):
            factor = torch.ones(6, dtype=torch.float64, requires_grad=True)
            handle = model.get_submodule(layer).register_forward_hook(
                lambda m, a, o, f=factor: o * f
            )
            F.mse_loss(model(one[None]), target[None]).backward()
            handle.remove()
            total += float(factor.grad[j]) ** 2
        totals.append(total)
    return totals


@pytest.mark.parametrize("by", ["variance", "saliency"])
def test_scores_are_those_of_loops(by):
    model = as_trained(mlp()).double().eval()
    x, y = pixels(5, 4, 5), pixels(5, 4, 3)
    scores = {"variance": brute_variance, "saliency": brute_saliency}[by](model, x, y, "2")
    model.zero_grad()
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    (place,) = td.plan_ordering(model, data, loss=nn.MSELoss(), by=by).places
    assert place.by.tolist() == sorted(range(6), key=lambda j: -scores[j])
    assert place.before == pytest.approx(sum(scores[:3]) / sum(scores))
    assert place.after == pytest.approx(sum(sorted(scores)[3:]) / sum(scores))
    assert all(p.grad is None for p in model.parameters())


def loss_with(model, x, y, layer, kept):
    mask = torch.tensor([float(j in kept) for j in range(6)], dtype=torch.float64)
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, o: o * mask)
    with torch.no_grad():
        loss = float(F.mse_loss(model(x), y))
    handle.remove()
    return loss


def test_greed_takes_what_lowers_the_loss_most():
    model = as_trained(mlp()).double().eval()
    x = pixels(40, 5)
    y = model(x).detach() + 0.1 * pixels(40, 3)
    kept = []
    while len(kept) < 6:
        rest = [j for j in range(6) if j not in kept]
        kept.append(min(rest, key=lambda j: loss_with(model, x, y, "2", [*kept, j])))
    data = [(x[:30], y[:30]), (x[30:], y[30:])]
    (place,) = td.plan_ordering(model, data, loss=nn.MSELoss(), by="greedy").places
    assert place.by.tolist() == kept
    none, full = (loss_with(model, x, y, "2", some) for some in ([], range(6)))
    fall = none - loss_with(model, x, y, "2", kept[:3])
    assert place.after == pytest.approx(fall / (none - full))
    fall = none - loss_with(model, x, y, "2", range(3))
    assert place.before == pytest.approx(fall / (none - full))


@pytest.mark.parametrize("by", ["variance", "saliency", "greedy"])
def test_heads_stay_whole(by):
    model = as_trained(grouped_heads()).double()
    x, y = pixels(8, 4, 5), pixels(8, 4, 3)
    with torch.no_grad():
        model.o.weight[:, 6:] *= 10  # the second two heads matter more
        y += model(x)
    (place,) = td.plan_ordering(model, [(x, y)], loss=nn.MSELoss(), by=by).places
    assert place.by.tolist() == [*range(6, 12), *range(6)]
    ordered = td.order(model, [(x, y)], loss=nn.MSELoss(), by=by).eval()
    assert_close(ordered(x), model.eval()(x), rtol=1e-10, atol=1e-11)


def test_a_rotation_is_the_best_of_all_linear_bottlenecks():
    """Of a linear network with isometric decoder: the error at k is that of the k-th SVD."""
    x = pixels(50, 8) @ pixels(8, 8)
    decoder = torch.linalg.qr(pixels(8, 8)).Q
    model = nn.Sequential(nn.Linear(8, 8, False), TailDropout(), nn.Linear(8, 8, False)).double()
    with torch.no_grad():
        model[0].weight.copy_(decoder.T)
        model[2].weight.copy_(decoder)
    ordered = td.order(model, [x[:20], x[20:]]).eval()
    left = torch.linalg.svdvals(x).square()
    for k in range(9):
        with ordered[1].using_k(k), torch.no_grad():
            error = (ordered(x) - x).square().sum()
        assert_close(error, left[k:].sum(), rtol=1e-9, atol=1e-9)


def digits():
    return torch.tensor(load_digits().data, dtype=torch.float32) / 16


def trained_autoencoder():
    torch.manual_seed(0)
    x = digits()
    encoder = [nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 12), TailDropout(lengths=lengths.Full())]
    model = nn.Sequential(*encoder, nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 64))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        batch = x[torch.randint(len(x), (64,))]
        optimizer.zero_grad()
        F.mse_loss(model(batch), batch).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("by", ["variance", "saliency", "greedy"])
def test_the_first_features_of_a_trained_network_do_more(by, rotate):
    model, x = trained_autoencoder(), digits()
    data = [(x, x)]
    ordered = td.order(model, data, loss=nn.MSELoss(), by=by, rotate=rotate, samples=500)
    ks = [2, 4, 6, 8, 12]
    before, after = (
        td.scree(m, nn.MSELoss(), data, ks=ks, progress=False).loss for m in (model, ordered)
    )
    assert after[:4].mean() < 0.9 * before[:4].mean()
    assert_close(after[4], before[4], rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------- with an optimizer

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.02),
}


def train(model, optimizer, batches):
    """The outputs after each step."""
    for x, y in batches:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        yield model(x).detach()


def both(make, optimizer, x_shape, y_shape, steps=4):
    """A network in training, and a copy of it with its optimizer."""
    torch.manual_seed(0)
    model = make().double()
    for layer in td.tail_dropouts(model).values():
        layer.lengths = lengths.Full()
    trained = OPTIMIZERS[optimizer](model.parameters())
    batches = [(pixels(*x_shape), pixels(*y_shape)) for _ in range(2 * steps)]
    list(train(model, trained, batches[:steps]))
    return model, trained, *copy.deepcopy((model, trained)), batches[steps:]


@pytest.mark.parametrize(
    ("make", "x_shape", "y_shape"),
    [(mlp, (8, 5), (8, 3)), (conv_net, (4, 1, 9, 9), (4, 3)), (gated_mlp, (8, 5), (8, 3))],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_the_order_had_always_been_so(optimizer, make, x_shape, y_shape):
    model, trained, other, others, batches = both(make, optimizer, x_shape, y_shape)
    parameters = list(model.parameters())
    assert td.order(model, [batches[0][0]], optimizer=trained) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert any(
        a.shape == b.shape and not torch.equal(a, b)
        for a, b in zip(parameters, other.parameters(), strict=True)
    )
    for actual, expected in zip(
        train(model, trained, batches), train(other, others, batches), strict=True
    ):
        assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_state_that_stays_behind_would_be_seen():
    model, trained, other, others, batches = both(mlp, "Adam", (8, 5), (8, 3))
    model.load_state_dict(td.order(model, [batches[0][0]]).state_dict())
    *_, actual = train(model, trained, batches)
    *_, expected = train(other, others, batches)
    assert not torch.allclose(actual, expected, rtol=1e-3)


def test_sgd_does_not_notice_a_rotation():
    model, trained, other, others, batches = both(bottleneck, "SGD", (8, 5), (8, 3))
    td.order(model, [batches[0][0]], optimizer=trained)
    for actual, expected in zip(
        train(model, trained, batches), train(other, others, batches), strict=True
    ):
        assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_of_adam_a_rotation_turns_the_mean_and_the_squares_by_its_own():
    model, trained, other, others, batches = both(bottleneck, "Adam", (8, 5), (8, 3))
    plan = td.plan_ordering(model, [batches[0][0]])
    plan.apply(model, trained)
    turn = plan.places[0].by
    for i, (new, old) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
        dim = {0: 0, 1: 0, 2: 1}.get(i)  # the bias of what reads the features has other ones
        if dim is None:
            assert_same(trained.state[new], others.state[old])
            continue
        a, b = trained.state[new], others.state[old]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            by = turn if key == "exp_avg" else turn**2
            rows = b[key].movedim(dim, 0)
            expected = [sum(by[j, i] * rows[j] for j in range(6)) for i in range(6)]
            assert_close(a[key].movedim(dim, 0), torch.stack(expected))


def everything(model, optimizer):
    """Bit for bit."""
    states = [dict(optimizer.state[p]) for p in model.parameters()]
    return copy.deepcopy((model.state_dict(), states, [p.grad for p in model.parameters()]))


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("Rprop", "'step_size' of .* plan with rotate=False"),
        ("Adafactor", "'(row|col)_var' of .* plan with rotate=False"),
    ],
)
def test_what_no_rotation_is_known_for_is_refused_before_anything_changes(optimizer, words):
    model, trained, *_, batches = both(bottleneck, optimizer, (8, 5), (8, 3))
    before = everything(model, trained)
    with pytest.raises(ValueError, match=words):
        td.order(model, [batches[0][0]], optimizer=trained)
    assert_same(everything(model, trained), before)
    td.order(model, [batches[0][0]], optimizer=trained, rotate=False)


def test_an_optimizer_of_other_parameters_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match="must hold the parameters of the model"):
        td.order(model, [torch.randn(8, 5)], optimizer=torch.optim.SGD(mlp().parameters(), 0.1))


def test_state_of_another_shape_is_refused():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())
    x = torch.randn(8, 5)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="must keep tensors of the shape"):
        td.order(model, [x], optimizer=optimizer)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupt_leaves_all_as_it_was(monkeypatch, after):
    model, trained, *_, batches = both(mlp, "Adam", (8, 5), (8, 3))
    plan, before = td.plan_ordering(model, [batches[0][0]]), everything(model, trained)
    plain, calls = rearranging.rearranged, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == done + after:
            raise KeyboardInterrupt
        return plain(*args)

    plan.apply(model)  # how many calls the copies take
    monkeypatch.setattr(rearranging, "rearranged", interrupted)
    done = 6  # three tensors, in two copies
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model, trained)
    assert len(calls) == done + after
    assert_same(everything(model, trained), before)


# ------------------------------------------------------------------------------------ the rest


def test_a_k_that_is_set_is_left_set_and_not_in_force():
    model = as_trained(mlp()).double()
    model[2].set_k(2)
    x = pixels(8, 5)
    ordered = td.order(model, [x])
    assert (model[2].k, ordered[2].k) == (2, 2)
    with td.at_width(model, 0.5):
        same = td.order(model, [x]).eval()
    assert_close(same(x), ordered.eval()(x), rtol=0, atol=0)
    ordered.eval()
    assert_close(ordered(x), model.eval()(x), rtol=1e-10, atol=1e-11)


def test_measuring_leaves_no_trace():
    model = as_trained(conv_net()).train()
    x, y = torch.randn(8, 1, 9, 9), torch.randint(3, (8,))
    before = snapshot(model)
    for by in ("variance", "saliency", "greedy"):
        td.plan_ordering(model, [(x, y)], loss=nn.CrossEntropyLoss(), by=by)
    assert_same(snapshot(model), before)


def test_shuffled_data_draw_no_random_numbers_of_the_training():
    model = mlp()
    data = torch.utils.data.DataLoader(torch.randn(8, 5), 4, shuffle=True)
    state = torch.get_rng_state()
    td.Schedule(model, 2, data=data, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    td.order(model, data)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_limit_the_data():
    seen = []

    def batches():
        for i in range(10):
            seen.append(i)
            yield torch.randn(8, 5)

    td.plan_ordering(mlp(), batches(), samples=20)
    assert seen == [0, 1, 2]


def test_a_nested_network_is_drawn_together_still():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    td.nest(model, torch.randn(2, 5))
    ordered = td.order(model, [torch.randn(8, 5)]).train()
    ordered(torch.randn(50, 5))
    first, second = (layer.drawn_k for layer in td.tail_dropouts(ordered).values())
    assert not ((first[:, None] < first) & (second[:, None] > second)).any()


def test_a_plan_for_another_network_is_refused():
    plan = td.plan_ordering(mlp(), [torch.randn(8, 5)])
    with pytest.raises(PruningError, match=r"rearranges '.*' of size 6 along dim"):
        plan.apply(mlp(7))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "size"}, r"by must be one of .*'greedy'"),
        ({"by": "greedy"}, "needs a loss"),
        ({"layer": "nowhere"}, "layer must fit TailDropout layers"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"data": []}, "at least one batch"),
        ({"data": iter([]), "by": "saliency", "loss": nn.MSELoss()}, "several times"),
        ({"data": [torch.full((8, 5), torch.nan)]}, "must be finite"),
    ],
)
def test_wrong_use(options, words):
    data = options.pop("data", [torch.randn(8, 5)])
    with pytest.raises(ValueError, match=words):
        td.plan_ordering(mlp(), data, **options)
