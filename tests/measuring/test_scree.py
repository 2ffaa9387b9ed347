import functools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import taildropout as td
from taildropout import Scree, TailDropout, TailMLP

N = 5


def model_of(n=N, *behind):
    return nn.Sequential(nn.Linear(4, n), TailDropout(), *behind, nn.Linear(n, 3)).double()


def two_layers():
    return nn.Sequential(
        nn.Linear(4, N), TailDropout(), nn.Tanh(), nn.Linear(N, N), TailDropout(), nn.Linear(N, 3)
    ).double()


def batches(*sizes, target=lambda size: torch.randn(size, 3, dtype=torch.float64)):
    return [(torch.randn(size, 4, dtype=torch.float64), target(size)) for size in sizes]


def squared_error(output, target):
    return (output - target).square().mean(1)


def scree(model, loss, data, **options):
    return td.scree(model, loss, data, progress=False, **options)


@torch.no_grad()
def by_hand(model, layer, ks, data, loss):
    """Per-sample losses by a loop over k: `(len(ks), samples)`."""
    model.eval()
    rows = []
    for k in ks:
        with layer.using_k(k):
            rows.append(np.concatenate([loss(model(x), y).numpy() for x, y in data]))
    return np.array(rows)


def assert_measures(result, losses):
    assert result.count == losses.shape[1]
    options = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(result.loss, torch.tensor(losses.mean(1)), **options)
    assert_close(result.cov, torch.tensor(np.cov(losses)), **options)
    assert_close(
        result.stderr, torch.tensor(losses.std(1, ddof=1) / losses.shape[1] ** 0.5), **options
    )


@pytest.mark.parametrize("sizes", [(7,), (8, 8, 3), (1, 2, 1), (5, 0, 4)])
def test_mean_covariance_and_count_are_those_of_a_loop_over_k(sizes):
    model, data = model_of(N, nn.Tanh()), batches(*sizes)
    result = scree(model, squared_error, data)
    assert result.layer == "1"
    assert result.ks == list(range(N + 1))
    assert_measures(result, by_hand(model, model[1], result.ks, data, squared_error))


def test_the_covariance_stands_a_large_offset_of_the_loss():
    model, data = model_of(N, nn.Tanh()), batches(40, 30)
    plain = scree(model, squared_error, data)
    shifted = scree(model, lambda o, t: squared_error(o, t) + 1e8, data)
    assert_close(shifted.cov, plain.cov, rtol=1e-6, atol=1e-7)


def test_the_model_runs_in_eval_mode_without_gradients():
    model, data = nn.Sequential(nn.Dropout(), model_of()), batches(9)
    seen = set()

    def loss(output, target):
        seen.update((module.training, output.requires_grad) for module in model.modules())
        return squared_error(output, target)

    result = scree(model, loss, data)
    assert seen == {(False, False)}
    assert_measures(result, by_hand(model, model[1][1], result.ks, data, squared_error))


@pytest.mark.parametrize(
    "ks",
    [
        [3, 0, 5, 3],
        (5, 3, 0),
        {0, 3, 5},
        iter([5, 3, 0]),
        np.array([3, 0, 5]),
        torch.tensor([0, 3, 5]),
    ],
)
def test_given_ks_are_measured_in_increasing_order(ks):
    model, data = model_of(), batches(6)
    result = scree(model, squared_error, data, ks=ks)
    assert result.ks == [0, 3, 5]
    assert {type(k) for k in result.ks} == {int}
    assert_measures(result, by_hand(model, model[1], [0, 3, 5], data, squared_error))


def test_ks_may_be_fractions_of_n():
    model, data = model_of(8), batches(6)
    result = scree(model, squared_error, data, ks=[1.0, 0, 0.25, 2, 0.3, np.float64(0.5)])
    assert result.ks == [0, 2, 3, 4, 8]  # a quarter is 2, and 0.3 of 8 is rounded up
    assert_measures(result, by_hand(model, model[1], result.ks, data, squared_error))


def test_all_ks_up_to_256():
    assert scree(model_of(256), squared_error, batches(3)).ks == list(range(257))


@pytest.mark.parametrize("n", [257, 1000, 20_000])
def test_128_geometrically_spaced_sizes_beyond(n):
    ks = scree(model_of(n), squared_error, batches(1)).ks
    sizes = n ** (np.arange(128) / 127)  # from 1 to n; the smallest round to the same integers
    assert ks == sorted({0, *np.rint(sizes).astype(int).tolist()})


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model_of().double()

    def forward(self, a, b):
        return self.body(a * b)


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict():
    model = Two()
    pairs = [(torch.randn(6, 4).double(), torch.randn(6, 4).double()) for _ in range(2)]
    target = torch.randn(6, 3).double()
    expected = scree(model.body, squared_error, [(a * b, target) for a, b in pairs])
    for inputs in (lambda *ab: ab, lambda *ab: list(ab), lambda a, b: {"b": b, "a": a}):
        result = scree(model, squared_error, [(inputs(a, b), target) for a, b in pairs])
        assert result.layer == "body.1"
        assert_close(result.loss, expected.loss)


def test_data_may_be_a_loader_or_a_generator():
    model, data = model_of(), batches(4, 4, 2)
    expected = scree(model, squared_error, data)
    joined = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    for other in (iter(data), DataLoader(joined, batch_size=3)):
        result = scree(model, squared_error, other)
        assert_close(result.loss, expected.loss)
        assert_close(result.cov, expected.cov)


class Movable:
    """Stands for a tensor, and notes where it is moved to."""

    def __init__(self, moves):
        self.moves = moves

    def to(self, device):
        self.moves.append(str(device))
        return torch.ones(2, 4, dtype=torch.float64)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu", 0)])
def test_inputs_and_target_are_moved_to_the_device(device):
    moves = []
    data = [((Movable(moves),), {"y": Movable(moves)})]
    scree(model_of(), lambda o, t: (o - t["y"][:, :3]).square().mean(1), data, device=device)
    assert moves == [str(device or "cpu")] * 2


def test_of_several_layers_one_is_swept_and_the_others_keep_their_k():
    model, data = two_layers(), batches(6)
    model.eval()
    model[1].set_k(2)
    model[4].set_k(3)
    result = scree(model, squared_error, data, layer="4")
    assert (model[1].k, model[4].k) == (2, 3)
    model[4].set_k(None)
    rows = []
    for k in range(N + 1):
        with model[4].using_k(k), torch.no_grad():
            rows.append(torch.cat([squared_error(model(x), y) for x, y in data]))
    assert_close(result.loss, torch.stack(rows).mean(1))


@pytest.mark.parametrize("widths", [0.4, {"1": 2}, {"1": 2, "4": 1}])
def test_inside_at_width_the_others_keep_it_and_the_swept_layer_does_not(widths):
    model, data = two_layers(), batches(6)
    with td.at_width(model, widths):
        result = scree(model, squared_error, data, layer="4")
    assert result.ks == list(range(N + 1))
    with model[1].using_width(2):
        assert_measures(result, by_hand(model, model[4], result.ks, data, squared_error))


def test_a_compiled_model_is_measured_like_the_model_in_it():
    model, data = two_layers(), batches(6)
    expected = scree(model, squared_error, data, layer="4")
    result = scree(torch.compile(model, backend="eager"), squared_error, data, layer="4")
    assert result.layer == "4"
    assert_close(result.loss, expected.loss)


class SetUp(nn.Module):
    """Some models do more than change their mode in `train()` and `eval()`: merge weights, say."""

    def __init__(self):
        super().__init__()
        self.body = model_of()

    def train(self, mode=True):
        raise AssertionError("this is for whoever trains the model")

    def forward(self, x):
        return self.body(x)


def test_modes_are_changed_without_a_call_of_train_or_eval():
    model, data = SetUp(), batches(6)
    result = scree(model, squared_error, data)
    assert_measures(result, by_hand(model.body, model.body[1], result.ks, data, squared_error))


class Tagger(nn.Module):
    """Outputs of a GRU, (time, batch, features), read at the last time."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, N)
        self.dropout = TailDropout(batch_dim=1)
        self.head = nn.Linear(N, 3)

    def forward(self, x):  # (batch, 8)
        return self.head(self.dropout(self.gru(x.view(len(x), 4, 2).transpose(0, 1))[0]))[-1]


def test_a_layer_whose_batch_dim_is_not_the_first():
    model = Tagger().double()
    data = [(torch.randn(6, 8).double(), torch.randn(6, 3).double()) for _ in range(2)]
    result = scree(model, squared_error, data)
    assert_measures(result, by_hand(model, model.dropout, result.ks, data, squared_error))


class Around(nn.Module):
    """A network in which something passes the layer by, or the samples are not independent."""

    def __init__(self, way):
        super().__init__()
        self.into, self.dropout, self.out = nn.Linear(4, 4), TailDropout(), nn.Linear(4, 3)
        self.way = way

    def forward(self, x):
        return getattr(self, self.way)(x, self.into(x))

    def skip(self, x, h):
        return self.out(x + self.dropout(h))

    def gate(self, x, h):
        return self.out(self.dropout(h)) * x.sum(1, keepdim=True)

    def twice(self, x, h):
        return self.out(self.dropout(self.into(self.dropout(h))))

    def read_twice(self, x, h):
        h = self.dropout(h)
        return self.out(h) + self.out(h.exp())

    def across_the_batch(self, x, h):
        h = self.dropout(h)
        return self.out(h - h.mean(0))

    def reshaped(self, x, h):
        return self.out(self.dropout(h).view(len(x), 4))


@pytest.mark.parametrize("sizes", [(6, 3), (1, 6), (0, 6), (6, 1)], ids=str)
@pytest.mark.parametrize(
    "way", ["skip", "gate", "twice", "read_twice", "across_the_batch", "reshaped"]
)
def test_networks_that_let_something_pass_the_layer_by(way, sizes):
    model, data = Around(way).double(), batches(*sizes)
    result = scree(model, squared_error, data)
    assert_measures(result, by_hand(model, model.dropout, result.ks, data, squared_error))


@pytest.mark.parametrize("memory", [1, 7_000, 15_000, 30_000, 2**30])
@pytest.mark.parametrize("way", ["skip", "across_the_batch"])
def test_such_networks_where_memory_is_short_and_batches_differ(way, memory):
    """However many ks fit at first, the next batch, smaller, has room for more."""
    model, data = Around(way).double(), batches(64, 2)
    result = scree(model, squared_error, data, memory=memory)
    assert_measures(result, by_hand(model, model.dropout, result.ks, data, squared_error))


class Regressor(Tagger):
    """One number per sequence, or one for each of its four times: `(batch, 1)` or `(batch, 4)`."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        outputs = self.gru(x.view(len(x), 4, 2).transpose(0, 1))[0]
        return self.head(self.dropout(outputs))[-self.times :, :, 0].T


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("sizes", [(6, 1), (6, 4), (1, 6), (4, 6)], ids=str)
def test_batches_as_large_as_another_dim(sizes, times):
    """Nothing takes the times of a target for its samples."""
    model = Regressor(times).double()
    data = [(torch.randn(size, 8).double(), torch.randn(size, times).double()) for size in sizes]
    result = scree(model, squared_error, data)
    assert_measures(result, by_hand(model, model.dropout, result.ks, data, squared_error))


class CallsByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.head = TailDropout(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.dropout(input=x))


def test_a_layer_that_is_called_by_keyword():
    model, data = CallsByKeyword().double(), batches(6)
    result = scree(model, squared_error, data)
    assert result.ks == [0, 1, 2, 3, 4]
    assert_measures(result, by_hand(model, model.dropout, result.ks, data, squared_error))


def test_the_layer_of_a_tail_mlp():
    model, data = nn.Sequential(TailMLP(4, N, 3)).double(), batches(6)
    result = scree(model, squared_error, data)
    assert (result.layer, result.ks) == ("0.dropout", list(range(N + 1)))
    plain = model[0].to_sequential()
    assert_measures(result, by_hand(plain, plain[2], result.ks, data, squared_error))


def classes(size):
    return torch.randint(3, (size,))


LOSSES = [
    (nn.MSELoss, lambda size: torch.randn(size, 3).double(), squared_error),
    (
        nn.SmoothL1Loss,
        lambda size: torch.randn(size, 3).double(),
        lambda o, t: nn.functional.smooth_l1_loss(o, t, reduction="none").mean(1),
    ),
    (
        nn.BCEWithLogitsLoss,
        lambda size: torch.rand(size, 3).double(),
        lambda o, t: nn.functional.binary_cross_entropy_with_logits(o, t, reduction="none").mean(1),
    ),
    (nn.CrossEntropyLoss, classes, lambda o, t: -o.log_softmax(1).gather(1, t[:, None])[:, 0]),
    (nn.NLLLoss, classes, lambda o, t: -o.gather(1, t[:, None])[:, 0]),
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("module", "target", "by_sample"), LOSSES)
def test_loss_modules_give_the_mean_of_each_sample(module, target, by_sample, reduction):
    model, data = model_of(), batches(5, 4, target=target)
    loss = module(reduction=reduction)
    result = scree(model, loss, data)
    assert loss.reduction == reduction
    assert_measures(result, by_hand(model, model[1], result.ks, data, by_sample))


def probabilities(*shape):
    return torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("module", "options", "shape", "target"),
    [
        (nn.CrossEntropyLoss, {}, (3, 4, 2), torch.randint(3, (8, 4, 2))),
        (nn.CrossEntropyLoss, {}, (3,), probabilities(8, 3).softmax(1)),
        (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, (3,), classes(8)),
        (nn.NLLLoss, {}, (3, 4), torch.randint(3, (8, 4))),
        (nn.MSELoss, {}, (3, 4, 2), probabilities(8, 3, 4, 2)),
        (nn.MSELoss, {}, (), probabilities(8)),
        (nn.BCEWithLogitsLoss, {"pos_weight": 3 * torch.rand(3)}, (3,), probabilities(8, 3)),
        (nn.SmoothL1Loss, {"beta": 0.1}, (3, 2), probabilities(8, 3, 2)),
    ],
)
def test_loss_modules_with_other_dims_and_options(module, options, shape, target):
    """The oracle calls the module for one sample at a time."""
    wide = nn.Sequential(nn.Linear(4, N), TailDropout(), nn.Linear(N, math.prod(shape))).double()
    model = nn.Sequential(wide, Reshape(shape))
    data = [(torch.randn(8, 4, dtype=torch.float64), target)]
    loss = module(**options).double()

    def by_sample(output, target):
        return torch.stack([loss(output[i : i + 1], target[i : i + 1]) for i in range(8)])

    result = scree(model, loss, data)
    assert_measures(result, by_hand(model, wide[1], result.ks, data, by_sample))


class Reshape(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.reshape(len(x), *self.shape)


class SquaredError(nn.Module):
    """A loss module without a `reduction`."""

    def forward(self, output, target):
        return squared_error(output, target)


def test_a_loss_module_of_ones_own_is_used_as_it_is():
    model, data = model_of(), batches(6)
    result = scree(model, SquaredError(), data)
    assert_measures(result, by_hand(model, model[1], result.ks, data, squared_error))


REFUSED_LOSSES = [
    (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "CrossEntropyLoss with class weights"),
    (nn.NLLLoss(weight=torch.ones(3)), ValueError, "NLLLoss with class weights"),
    (nn.CrossEntropyLoss(ignore_index=1), ValueError, r"ignored targets \(1\)"),
    (nn.functional.cross_entropy, TypeError, r"one value per sample.*got shape \(\).*reduction"),
    (lambda o, t: 1.0, TypeError, "one value per sample.*got 1.0"),
    (lambda o, t: o, TypeError, r"one value per sample.*got shape \(6, 3\)"),
    (lambda o, t: None, TypeError, "one value per sample.*got None"),
    (functools.partial(nn.functional.cross_entropy, reduction="sum"), TypeError, "call partial"),
]


@pytest.mark.parametrize(("loss", "error", "words"), REFUSED_LOSSES)
def test_losses_that_are_not_per_sample_are_refused(loss, error, words):
    data = [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))]
    with pytest.raises(error, match=words):
        scree(model_of().float(), loss, data)


TWO_LAYERS = nn.Sequential(TailDropout(), nn.Linear(4, 3), TailDropout())
NOT_CALLED = nn.Sequential(nn.Linear(4, 3))
NOT_CALLED[0].unused = TailDropout()


class TwoWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = TailDropout()

    def forward(self, x):
        self.dropout(x[:, :2])
        return self.dropout(x)[:, :3]


USED_UP = iter(())
DATA = [(torch.randn(6, 4), torch.randn(6, 3))]


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "words"),
    [
        (nn.Linear(4, 3), DATA, {}, ValueError, "must contain a TailDropout layer"),
        (TWO_LAYERS, DATA, {}, ValueError, r"one of the model's .* \['0', '2'\], got None"),
        (TWO_LAYERS, DATA, {"layer": "1"}, ValueError, r"\['0', '2'\], got '1'"),
        (NOT_CALLED, DATA, {}, ValueError, "'0.unused' must be called .* got no call"),
        (TwoWidths(), DATA, {}, ValueError, r"with one number of features, got \[2, 4\]"),
        (model_of(), batches(0, 0), {}, ValueError, "must yield at least one sample"),
        (model_of().float(), [], {}, ValueError, "must yield at least one sample"),
        (model_of().float(), USED_UP, {}, ValueError, "a used-up generator"),
        (model_of().float(), DATA, {"ks": [6]}, ValueError, "at most the number of features n=5"),
        (model_of().float(), DATA, {"ks": [-1]}, ValueError, "k must be at least 0, got -1"),
        (model_of().float(), DATA, {"ks": []}, ValueError, "ks must be at least one k"),
        (model_of().float(), DATA, {"ks": [1.5]}, ValueError, r"must be in \(0, 1\], got 1.5"),
        (model_of().float(), DATA, {"ks": [0.0]}, ValueError, r"must be in \(0, 1\], got 0.0"),
        (model_of().float(), DATA, {"ks": ["2"]}, TypeError, "k must be an integer .* got '2'"),
        (model_of().float(), DATA, {"ks": [True]}, TypeError, "k must be an integer .* got True"),
        (model_of().float(), [DATA[0] * 2], {}, ValueError, "must yield pairs .* got tuple"),
        (model_of().float(), [{"x": 1, "y": 2}], {}, ValueError, "must yield pairs .* got dict"),
        (model_of().float(), [DATA[0][0]], {}, ValueError, "must yield pairs .* got Tensor"),
    ],
)
def test_bad_arguments_are_refused(model, data, options, error, words):
    with pytest.raises(error, match=words):
        scree(model, squared_error, data, **options)


def state(model):
    return {
        "modes": [module.training for module in model.modules()],
        "ks": [layer.k for layer in td.tail_dropouts(model).values()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "forwards": ["forward" in vars(module) for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "tensors": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "random": torch.get_rng_state().tolist(),
    }


def in_a_peculiar_state():
    model = nn.Sequential(
        nn.Linear(4, N),
        TailDropout(),
        nn.BatchNorm1d(N),
        nn.Dropout(),
        TailDropout(),
        nn.Linear(N, 3),
    )
    model[2].eval()
    model[1].set_k(2)
    model[4].training = False
    model[4].set_k(torch.tensor(4))
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(3)
    model[5].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 1, 9])
def test_the_model_is_afterwards_as_it_was(error, after):
    model = in_a_peculiar_state()
    before = state(model)
    calls = []

    def loss(output, target):
        calls.append(len(output))
        torch.rand(3)
        if error is not None and len(calls) > after:
            raise error("stop")
        return (output - target).square().mean(1)

    def measure():
        scree(model, loss, DATA * 9, layer="1")

    if error is None:
        measure()
    else:
        with pytest.raises(error, match="stop"):
            measure()
    assert state(model) == before


def data_that_fails():
    yield from DATA
    raise KeyboardInterrupt("stop")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (data_that_fails(), KeyboardInterrupt, "stop"),
        ([(torch.randn(6, 5), torch.randn(6, 3))], RuntimeError, "shapes cannot be multiplied"),
        ([None], ValueError, "pairs"),
    ],
    ids=["in the data", "in the model", "in the batch"],
)
def test_the_model_is_as_it_was_where_something_else_fails(data, error, words):
    model = in_a_peculiar_state()
    before = state(model)
    with pytest.raises(error, match=words):
        scree(model, squared_error, data, layer="1")
    assert state(model) == before


def test_nothing_is_printed_without_progress(capsys):
    scree(model_of(), squared_error, batches(3))
    assert capsys.readouterr() == ("", "")


def test_progress_is_shown_on_request(capsys):
    td.scree(model_of(), squared_error, batches(3, 3))
    assert "2/2" in capsys.readouterr().err


def test_one_sample_has_no_standard_error():
    result = scree(model_of(), squared_error, batches(1))
    assert result.count == 1
    assert result.stderr.isnan().all()


@pytest.mark.parametrize("samples", [7, 1])
def test_the_result_survives_json(samples):
    result = scree(model_of(), squared_error, batches(samples))
    again = Scree.from_dict(json.loads(json.dumps(result.to_dict())))
    assert (again.layer, again.ks, again.count) == (result.layer, result.ks, result.count)
    assert_close(again.loss, result.loss, rtol=0, atol=0)
    assert_close(again.cov, result.cov, rtol=0, atol=0, equal_nan=True)


def test_a_table_for_pandas():
    result = scree(model_of(), squared_error, batches(7))
    table = result.to_pandas()
    assert table.index.name == "k"
    assert table.index.tolist() == result.ks
    assert table["loss"].tolist() == result.loss.tolist()
    assert table["stderr"].tolist() == result.stderr.tolist()


@pytest.mark.parametrize("side", ["in front", "behind"])
def test_a_pruned_network_that_was_cut_on_one_side_only(side):
    """Its layer slices or adds zeros; its ks are still those of the layer."""
    between = [nn.LayerNorm(6)]
    model = nn.Sequential(
        nn.Linear(4, 6),
        *(between if side == "in front" else []),
        TailDropout(),
        *(between if side == "behind" else []),
        nn.Linear(6, 3),
    )
    data = [(torch.randn(8, 4), torch.randn(8, 3))]
    small = td.prune(model, 4, data[0][0])
    large_scree = td.scree(model, nn.MSELoss(), data, ks=range(5), progress=False)
    small_scree = td.scree(small, nn.MSELoss(), data, progress=False)
    assert small_scree.ks == [0, 1, 2, 3, 4]
    assert_close(small_scree.loss, large_scree.loss, rtol=1e-5, atol=1e-7)


def test_a_layer_that_is_never_called_is_warned_of():
    class CallsOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.never = TailDropout(), TailDropout()

        def forward(self, x):
            return self.called(x)

    data = [(torch.randn(4, 3), torch.randn(4, 3))]
    with pytest.warns(UserWarning, match=r"never calls its TailDropout layers \['never'\]"):
        curve = scree(CallsOne(), nn.MSELoss(), data, layer="called")
    assert curve.ks == [0, 1, 2, 3]


# --- several layers at one width -----------------------------------------------------------------


class TwoLayers(nn.Module):
    """Layers of different n, one of them in groups, and a skip connection around both."""

    def __init__(self):
        super().__init__()
        self.first, self.a = nn.Linear(5, 8), TailDropout(multiple_of=2)
        self.second, self.b = nn.Linear(8, 12), TailDropout()
        self.last, self.skip = nn.Linear(12, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.b(self.second(self.a(self.first(x).relu())).relu())) + self.skip(x)


def of_two_layers():
    data = [(torch.randn(6, 5), torch.randn(6, 3)) for _ in range(2)]
    return TwoLayers().double().eval(), [(x.double(), y.double()) for x, y in data]


@pytest.mark.parametrize("features", ["first", "random", "principal"])
@pytest.mark.parametrize("pattern", ["*", "re:a|b", "[ab]"])
def test_several_layers_are_measured_at_one_width(pattern, features):
    model, data = of_two_layers()
    curve = scree(model, nn.MSELoss(), data, layer=pattern, features=features)
    assert curve.layer == pattern
    assert curve.ks == [i / 32 for i in range(33)]
    full = torch.stack([nn.functional.mse_loss(model(x), y) for x, y in data]).mean()
    assert_close(curve.loss[-1], full)
    assert curve.loss[:-1].max() > full


def test_the_loss_at_a_width_is_that_of_a_loop():
    model, data = of_two_layers()
    curve = scree(model, nn.MSELoss(), data, layer="*")
    for i, width in enumerate(curve.ks):
        with model.a.using_width(width), model.b.using_width(width):
            losses = [nn.functional.mse_loss(model(x), y) for x, y in data]
        assert_close(curve.loss[i], torch.stack(losses).mean())


def test_what_is_chosen_of_several_layers_is_what_prune_and_at_width_take():
    model, data = of_two_layers()
    curve = scree(model, nn.MSELoss(), data, layer="*", ks=[0.25, 0.5, 1.0])
    width = curve.choose(tolerance=1e6)
    assert (width, width.layer) == (0.25, "*")
    assert pickle.loads(pickle.dumps(width)).layer == "*"
    small = td.prune(model, width, data[0][0])
    assert (small.first.out_features, small.second.out_features) == (2, 3)
    with td.at_width(model.eval(), width):
        assert_close(small(data[0][0]), model(data[0][0]))
    assert "width = 0.25 of 1.0" in curve.explain(tolerance=1e6)
    assert td.Scree.from_dict(json.loads(json.dumps(curve.to_dict()))).choose(1e6) == 0.25


def test_a_network_that_is_good_enough_without_its_layers_can_be_cut_to_that():
    model, data = of_two_layers()
    width = scree(model, nn.MSELoss(), data, layer="*").choose(1e6)
    assert width == 0.0
    small = td.prune(model, width, data[0][0])
    with td.at_width(model, width):
        assert_close(small(data[0][0]), model(data[0][0]))


def test_a_width_that_was_chosen_of_some_layers_is_theirs():
    model, data = of_two_layers()
    width = scree(model, nn.MSELoss(), data, layer="re:b", ks=[0.5, 1.0]).choose(1e6)
    assert td.plan_pruning(model, width, data[0][0]).k == {"b": 6}
    random = scree(model, nn.MSELoss(), data, layer="*", features="random")
    with pytest.raises(ValueError, match='choose from a scree with features="first"'):
        td.prune(model, random.choose(1e6), data[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer": "x*"},
            r"layer must fit TailDropout layers of the model, \['a', 'b'\], got 'x\*'",
        ),
        ({"layer": "*", "ks": [1]}, r"must be widths, floats in \(0, 1\] where 1.0 is .* got 1"),
        ({"layer": "*", "ks": [0.0]}, r"must be in \(0, 1\], got 0.0"),
        ({"layer": "*", "ks": []}, "at least one width, got none"),
    ],
)
def test_widths_of_several_layers_are_fractions(options, message):
    model, data = of_two_layers()
    with pytest.raises(ValueError, match=message):
        scree(model, nn.MSELoss(), data, **options)
