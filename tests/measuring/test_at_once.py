"""The rest of the network runs once for many ks: against the plain loop with set_k.

Where each k runs by itself there is a warning, which is an error in these tests.
"""

import contextlib
import copy
import itertools
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import taildropout as td
from taildropout import TailDropout, TailMLP
from taildropout.functional import prefix_linear

N = 6


@torch.no_grad()
def by_loop(model, layer, loss, data, ks):
    """Per-sample losses, `(len(ks), samples)`; the model is in eval mode."""
    rows = []
    for k in ks:
        layer.set_k(k)
        rows.append(torch.cat([loss(run(model, inputs), target) for inputs, target in data]))
    layer.set_k(None)
    return torch.stack(rows).double()


def run(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def assert_same_as_loop(model, loss, data, *, by_sample=None, rtol=1e-5, **options):
    """`by_sample` is the loss with one value per sample, where `loss` is not that itself."""
    layers = td.tail_dropouts(model.eval())
    layer = layers[options.setdefault("layer", next(iter(layers)))]
    result = td.scree(model, loss, data, progress=False, **options)
    losses = by_loop(model, layer, by_sample or loss, data, result.ks)
    assert result.count == losses.shape[1]
    assert_close(result.loss, losses.mean(1), rtol=rtol, atol=0)
    cov = torch.cov(losses)
    assert_close(result.cov, cov, rtol=0, atol=10 * rtol * cov.abs().max().item())


def squared_error(output, target):
    return (output - target).float().square().flatten(1).mean(1)


def vectors(*sizes, inputs=4, outputs=3):
    return [(torch.randn(size, inputs), torch.randn(size, outputs)) for size in sizes]


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# --- networks that run for many ks at once --------------------------------------------------------


def images(*sizes, target):
    return [(torch.randn(size, 2, 8, 8), torch.randn(size, *target)) for size in sizes]


def linear_reader():
    return nn.Sequential(nn.Linear(4, N), nn.Tanh(), TailDropout(), nn.Linear(N, 3)), vectors(7, 5)


def linear_reader_of_tokens():
    model = nn.Sequential(nn.Linear(4, N), TailDropout(), nn.Linear(N, 3), nn.Tanh())
    return model, [(torch.randn(size, 5, 4), torch.randn(size, 5, 3)) for size in (4, 3)]


def activation_reader():
    model = nn.Sequential(nn.Linear(4, N), TailDropout(), nn.Sigmoid(), nn.Linear(N, 3))
    return model, vectors(7, 5)


def no_reader():
    return nn.Sequential(nn.Linear(4, 3), TailDropout()), vectors(7, 5)


def nothing_before():
    return nn.Sequential(TailDropout(), nn.Linear(4, 3)), vectors(7, 5)


def channels():
    model = nn.Sequential(
        nn.Conv2d(2, N, 3),
        nn.BatchNorm2d(N),
        nn.ReLU(),
        TailDropout(dropout_dim=1),
        nn.Conv2d(N, 3, 3, padding=1),
    )
    return model, images(4, 3, target=(3, 6, 6))


def channels_last_and_flattened():
    model = nn.Sequential(
        nn.Conv2d(2, N, 3),
        nn.GELU(),
        TailDropout(dropout_dim=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9 * N, 3),
    )
    return model.to(memory_format=torch.channels_last), images(4, 3, target=(3,))


def sequences_of_channels():
    model = nn.Sequential(nn.Conv1d(2, N, 3), TailDropout(dropout_dim=-2), nn.Conv1d(N, 3, 3))
    return model, [(torch.randn(size, 2, 9), torch.randn(size, 3, 5)) for size in (4, 3)]


def batch_norm_behind():
    model = nn.Sequential(nn.Linear(4, N), TailDropout(), nn.BatchNorm1d(N), nn.Linear(N, 3))
    model(torch.randn(50, 4))  # the running statistics are no longer the initial ones
    return model, vectors(7, 5)


def attention_over_tokens():
    model = nn.Sequential(
        nn.Linear(4, 8), TailDropout(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    )
    return model, [(torch.randn(size, 5, 4), torch.randn(size, 5, 8)) for size in (4, 3)]


def features_first():
    model = nn.Sequential(Lambda(torch.t), TailDropout(batch_dim=1, dropout_dim=0), Lambda(torch.t))
    return model.append(nn.Linear(4, 3)), vectors(7, 5)


def tail_mlp():
    return nn.Sequential(nn.Linear(4, 5), TailMLP(5, N, 3, p=0.5)), vectors(7, 5)


class TimeMajor(nn.Module):
    """A GRU's outputs, `(time, batch, features)`; at the last time, or, as they are, at all."""

    def __init__(self, *, last):
        super().__init__()
        self.gru = nn.GRU(2, N)
        self.dropout = TailDropout(batch_dim=1, dropout_dim=2)
        self.head = nn.Linear(N, 3)
        self.last = last

    def forward(self, x):
        output = self.head(self.dropout(self.gru(x)[0]))
        return output[-1] if self.last else output


def time_major():
    data = [(torch.randn(5, size, 2), torch.randn(size, 3)) for size in (4, 3)]
    return TimeMajor(last=True), data


def read_by_a_gru():
    model = nn.Sequential(nn.Linear(4, N), TailDropout(), nn.GRU(N, 3, batch_first=True))
    model.append(Lambda(lambda outputs_and_state: outputs_and_state[0]))
    return model, [(torch.randn(size, 5, 4), torch.randn(size, 5, 3)) for size in (4, 3)]


def one_activation_in_many_places():
    tanh = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, N), tanh, TailDropout(), nn.Linear(N, N), tanh)
    return model.append(nn.Linear(N, 3)), vectors(7, 5)


def in_place_behind():
    model = nn.Sequential(nn.Linear(4, N), TailDropout(inplace=True), nn.ReLU(inplace=True))
    return model.append(nn.Linear(N, 3)), vectors(7, 5)


def hook_on_the_reader():
    model, data = linear_reader()
    model[3].register_forward_hook(lambda module, args, output: output.exp())
    return model, data


def weight_norm_reader():
    model, data = linear_reader()
    nn.utils.parametrizations.weight_norm(model[3])
    return model, data


AT_ONCE = [
    linear_reader,
    linear_reader_of_tokens,
    activation_reader,
    no_reader,
    nothing_before,
    channels,
    channels_last_and_flattened,
    sequences_of_channels,
    batch_norm_behind,
    attention_over_tokens,
    features_first,
    tail_mlp,
    time_major,
    read_by_a_gru,
    one_activation_in_many_places,
    in_place_behind,
    hook_on_the_reader,
    weight_norm_reader,
]


@pytest.mark.parametrize("memory", [2**30, 12_000], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("network", AT_ONCE)
def test_the_losses_are_those_of_the_loop(network, memory):
    model, data = network()
    assert_same_as_loop(model, squared_error, data, memory=memory)


def test_targets_that_are_time_major_too():
    data = [(torch.randn(5, size, 2), torch.randn(5, size, 3)) for size in (4, 3)]
    assert_same_as_loop(
        TimeMajor(last=False), lambda o, t: (o - t).square().mean((0, 2)), data, rtol=1e-5
    )


LOSSES = [
    (nn.MSELoss(), torch.randn(5, 3, 6, 6), lambda o, t: F.mse_loss(o, t, reduction="none")),
    (
        nn.SmoothL1Loss(),
        torch.randn(5, 3, 6, 6),
        lambda o, t: F.smooth_l1_loss(o, t, reduction="none"),
    ),
    (
        nn.BCEWithLogitsLoss(),
        torch.rand(5, 3, 6, 6),
        lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="none"),
    ),
    (
        nn.CrossEntropyLoss(),
        torch.randint(3, (5, 6, 6)),
        lambda o, t: F.cross_entropy(o, t, reduction="none"),
    ),
    (nn.NLLLoss(), torch.randint(3, (5, 6, 6)), lambda o, t: F.nll_loss(o, t, reduction="none")),
]


@pytest.mark.parametrize(
    ("loss", "target", "by_pixel"), LOSSES, ids=[type(loss).__name__ for loss, *_ in LOSSES]
)
def test_loss_modules_of_pixels(loss, target, by_pixel):
    model = nn.Sequential(nn.Conv2d(2, N, 3), TailDropout(dropout_dim=1), nn.Conv2d(N, 3, 1))
    model.append(nn.LogSoftmax(1))
    assert_same_as_loop(
        model,
        loss,
        [(torch.randn(5, 2, 8, 8), target)],
        by_sample=lambda o, t: by_pixel(o, t).flatten(1).mean(1),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", [linear_reader, activation_reader, channels, tail_mlp])
def test_models_of_low_precision(network, dtype):
    """To a few roundings of that precision, in the mean of the samples."""
    model, data = network()
    data = [(inputs.to(dtype), target) for inputs, target in data]
    assert_same_as_loop(model.to(dtype), squared_error, data, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("network", [linear_reader, activation_reader, channels, tail_mlp])
def test_models_under_autocast(network):
    model, data = network()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_as_loop(model, squared_error, data, rtol=torch.finfo(torch.bfloat16).eps)


def test_prefix_linear_under_autocast_adds_up_as_accurately_as_linear():
    features, weight = torch.randn(100, 1000), torch.randn(10, 1000)
    exact = F.linear(features.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain, at_once = F.linear(features, weight), prefix_linear(features, weight)[-1]
    assert (at_once - exact).norm() <= 2 * (plain - exact).norm()


# --- several layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("swept", ["1", "4", "7"])
@pytest.mark.parametrize("others", [None, 2])
def test_other_layers_keep_their_k_or_pass_everything(swept, others):
    model = nn.Sequential()
    for features in (4, N, N):
        model.extend([nn.Linear(features, N), TailDropout(), nn.Tanh()])
    model.append(nn.Linear(N, 3)).eval()
    layers = td.tail_dropouts(model)
    for name, layer in layers.items():
        layer.set_k(None if name == swept else others)
    data = vectors(7, 5)
    result = td.scree(model, squared_error, data, layer=swept, progress=False)
    assert [layer.k for layer in layers.values()] == [
        None if name == swept else others for name in layers
    ]
    losses = by_loop(model, layers[swept], squared_error, data, result.ks)
    assert_close(result.loss, losses.mean(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("swept", [1, 3])
def test_another_layer_with_a_k_for_each_sample(swept):
    """In front it is one more producer; behind, its ks fit no larger batch."""
    model = nn.Sequential(nn.Linear(4, N), TailDropout(), nn.Linear(N, N), TailDropout())
    model.append(nn.Linear(N, 3)).eval()
    model[4 - swept].set_k(torch.tensor([0, 1, 2, 3, 4, 5, 6]))
    data = vectors(7, 7)
    result = td.scree(model, squared_error, data, layer=str(swept), progress=False)
    losses = by_loop(model, model[swept], squared_error, data, result.ks)
    assert_close(result.loss, losses.mean(1), rtol=1e-5, atol=0)


# --- what comes before the layer runs once -------------------------------------------------------


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("memory", [2**30, 300_000], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("behind", [[], [nn.Tanh()]], ids=["Linear", "other reader"])
def test_the_producer_runs_once_per_batch(behind, memory):
    """The first batch is run a few times more, to check; how often does not depend on the ks."""
    n, samples = 128, 90
    producer = Counted(4, n)
    model = nn.Sequential(nn.Sequential(producer), nn.ReLU(), TailDropout(), *behind)
    model.append(nn.Linear(n, 3))
    calls = []

    def data():
        rows = TensorDataset(torch.randn(samples, 4), torch.randn(samples, 3))
        for batch in DataLoader(rows, batch_size=20):  # the last one has 10
            calls.append(producer.calls)
            yield batch
        calls.append(producer.calls)

    result = td.scree(model, squared_error, data(), progress=False, memory=memory)
    assert (len(result.ks), result.count) == (n + 1, samples)
    first, *later = [after - before for before, after in itertools.pairwise(calls)]
    assert first <= 10
    assert later == [1, 1, 1, 1]


class Blocks(nn.Sequential):
    """With what a block gets added to what it gives."""

    def forward(self, x):
        for block in self:
            x = x + block(x)
        return x


@pytest.mark.parametrize("memory", [2**30, 20_000], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("inserted", [False, True])
def test_residual_blocks_before_the_layer_run_once_per_batch(inserted, memory):
    first, second, last = Counted(N, N), Counted(N, N), Counted(N, N)
    layer = TailDropout()
    blocks = Blocks(*(nn.Sequential(linear, nn.Tanh()) for linear in (first, second, last)))
    if inserted:
        td.insert(blocks, "1.1", layer)
    else:
        blocks[1].append(layer)
    data = vectors(40, 40, 40, inputs=N, outputs=N)
    assert_same_as_loop(blocks, squared_error, data, memory=memory)
    calls = []

    def watched():
        for batch in data:
            yield batch
            calls.append((first.calls, second.calls, last.calls))

    td.scree(blocks, squared_error, watched(), progress=False, memory=memory)
    chunks = 1 if memory == 2**30 else calls[2][2] - calls[1][2]
    assert [b - a for a, b in zip(calls[1], calls[2], strict=True)] == [1, 1, chunks]
    assert chunks > 1 or memory == 2**30


def test_where_each_k_runs_by_itself_the_producer_still_runs_once_per_batch():
    producer, behind = Counted(4, N), Counted(N, 3)
    model = nn.Sequential(producer, TailDropout(), Lambda(branching_on_a_value), behind)
    calls = []

    def data():
        for batch in vectors(7, 7, 7):
            calls.append((producer.calls, behind.calls))
            yield batch
        calls.append((producer.calls, behind.calls))

    with pytest.warns(UserWarning, match="runs each k by itself"):
        td.scree(model, squared_error, data(), progress=False)
    later = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(calls[1:])]
    assert later == [[1, N + 1]] * 2


def branching_on_a_value(h):
    return h.tanh() if h.sum() > 0 else h.sigmoid()


# --- memory -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """How many bytes the tensors that operations return take at most at the same time."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage.data_ptr()
                if key not in self.storages:
                    self.storages[key] = storage.nbytes()
                    weakref.finalize(storage, self.storages.pop, key, None)
                    self.peak = max(self.peak, sum(self.storages.values()))
        return output


@pytest.mark.parametrize(
    "behind",
    [[nn.Tanh(), nn.Linear(512, 3)], [nn.Linear(512, 700)]],
    ids=["other reader", "Linear"],
)
def test_513_ks_of_many_samples_stay_within_the_memory(behind):
    """The features, or the outputs, for all ks would take more than 16 times as much."""
    samples, memory = 256, 2**24
    covariance = 513 * 513 * 8
    model = nn.Sequential(nn.Linear(4, 512), TailDropout(), *behind)
    data = vectors(samples, outputs=behind[-1].out_features)
    with Live() as live:
        result = td.scree(model, squared_error, data, ks=range(513), memory=memory, progress=False)
    assert result.ks == list(range(513))
    assert memory / 4 < live.peak < memory + 4 * covariance


def test_memory_for_less_than_two_ks_is_enough():
    model, data = activation_reader()
    assert_same_as_loop(model, squared_error, data, memory=1)


# --- a transformer from a library ---------------------------------------------------------------


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=20,
            num_labels=3,
        )
    )


def sentences(size, *, padded):
    mask = torch.ones(size, 7, dtype=torch.long)
    mask[: size // 2, 4:] = 1 - int(padded)
    inputs = {"input_ids": torch.randint(50, (size, 7)), "attention_mask": mask}
    return inputs, torch.randint(3, (size,))


def loss_of_logits(output, target):
    return F.cross_entropy(output.logits, target, reduction="none")


@pytest.mark.parametrize("padded", [False, True])
def test_bert_with_a_layer_behind_its_pooler(padded):
    model = bert()
    model.bert.pooler = nn.Sequential(model.bert.pooler, TailDropout())
    data = [sentences(size, padded=padded) for size in (6, 5)]
    assert_same_as_loop(model, loss_of_logits, data)


def test_bert_with_a_layer_before_its_encoder():
    model = bert()
    td.insert(model, "bert.embeddings", TailDropout())
    assert_same_as_loop(model, loss_of_logits, [sentences(size, padded=False) for size in (6, 5)])


@pytest.mark.parametrize(
    "padded",
    [
        (True, True),
        (True, False),
        (False, True),
    ],
    ids=str,
)
def test_bert_whose_padding_mask_passes_the_layer_by(padded):
    """Without padding the library leaves the mask out: the first batch has nothing to object."""
    model = bert()
    td.insert(model, "bert.embeddings", TailDropout())
    assert_same_as_loop(model, loss_of_logits, [sentences(6, padded=p) for p in padded])


def test_bert_with_a_layer_beside_a_residual_connection():
    model = bert()
    block = model.bert.encoder.layer[0]
    block.intermediate = nn.Sequential(block.intermediate, TailDropout())
    assert_same_as_loop(model, loss_of_logits, [sentences(6, padded=padded) for padded in (0, 1)])


# --- networks in which something passes the layer by, or the samples meet ------------------------


class Surrounded(nn.Module):
    """A layer between two Linears, and what a subclass does beside it."""

    def __init__(self):
        super().__init__()
        self.into, self.dropout, self.out = nn.Linear(4, 4), TailDropout(), nn.Linear(4, 3)


class Residual(Surrounded):
    def forward(self, x):
        return self.out(F.layer_norm(x + self.dropout(self.into(x)), (4,)))


class Gate(Surrounded):
    def forward(self, x):
        h = self.into(x)
        return self.out(self.dropout(h).tanh() * h.sigmoid())


class LaterGate(Surrounded):
    """The first batch need not show that something passes the layer by."""

    def forward(self, x):
        output = self.out(self.dropout(self.into(x)).tanh())
        return output * x.sum(1, keepdim=True) if (x > 0).any() else output


class AttentionOverTheBatch(Surrounded):
    def forward(self, x):
        h = self.dropout(self.into(x)).tanh()
        return self.out((h @ h.T).softmax(1) @ h)


class BatchStatistics(Surrounded):
    """BatchNorm without running statistics takes those of the batch, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.out(self.norm(self.dropout(self.into(x))))


class KeptForLater(Surrounded):
    """The features pass the layer by as an attribute of a module."""

    def forward(self, x):
        self.kept = self.into(x)
        return self.out(self.dropout(self.kept).tanh() + self.kept)


class PlacesInTheBatch(Surrounded):
    """What is added depends on the place in the batch, cached by its size."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        h = self.dropout(self.into(x)).tanh()
        places = self.cache.setdefault(len(h), torch.linspace(0, 1, len(h))[:, None])
        return self.out(h + places)


class SumOverTheBatch(Surrounded):
    def forward(self, x):
        h = self.dropout(self.into(x))
        return self.out(h) + self.out(h).sum(0)


class FirstSample(Surrounded):
    def forward(self, x):
        h = self.dropout(self.into(x)).tanh()
        return self.out(h - h[:1])


class SortedByLength(Surrounded):
    """The samples leave in another order than they came."""

    def forward(self, x):
        output = self.out(self.dropout(self.into(x)).tanh())
        return output[output[:, 0].argsort()]


class InPlaceInFront(Surrounded):
    def forward(self, x):
        h = self.into(x)
        h += 1
        return self.out(self.dropout(h).tanh())


class InPlaceBehind(Surrounded):
    """Where the layer passes on what it gets, this changes what was computed in front of it."""

    def forward(self, x):
        h = self.dropout(self.into(x))
        h *= 2
        return self.out(h)


@pytest.mark.parametrize("memory", [2**30, 2_000])
@pytest.mark.parametrize("network", [InPlaceInFront, InPlaceBehind])
def test_functions_in_place_beside_the_layer(network, memory):
    assert_same_as_loop(network(), squared_error, vectors(8, 8, 5), memory=memory)


class InPlaceAfterABlock(Surrounded):
    """Changes in place what a module returned before the layer is reached."""

    def forward(self, x):
        h = self.into(x)
        h += x
        return self.out(F.layer_norm(h + self.dropout(h.relu_()), (4,)))


class OnlyItsNorm(Surrounded):
    """A batch norm behind the layer, in place behind that, and what was there before beside it."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm1d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        before = self.relu(self.norm(self.into(x)))
        h = self.relu(self.norm(self.dropout(before)))
        h += before
        return self.out(self.relu(h))


class Twice(Surrounded):
    def forward(self, x):
        return self.out(self.dropout(self.into(self.dropout(self.into(x)))))


class TwoTowers(Surrounded):
    """Each call of the layer is the first to depend on k."""

    def forward(self, x):
        return self.out(self.dropout(self.into(x)) * self.dropout(self.into(x.flip(1))))


class ReadByTwo(Surrounded):
    def forward(self, x):
        h = self.dropout(self.into(x))
        return self.out(h) * self.out(h.exp())


PASSING_BY = [
    Residual,
    Gate,
    AttentionOverTheBatch,
    BatchStatistics,
    KeptForLater,
    PlacesInTheBatch,
    SumOverTheBatch,
    FirstSample,
    SortedByLength,
    LaterGate,
    InPlaceAfterABlock,
    OnlyItsNorm,
    Twice,
    TwoTowers,
    ReadByTwo,
]


@pytest.mark.parametrize("memory", [2**30, 3_000])
@pytest.mark.parametrize("network", PASSING_BY)
def test_networks_in_which_something_passes_the_layer_by(network, memory):
    assert_same_as_loop(network(), squared_error, vectors(8, 8, 5, 2), memory=memory)


class Noisy(Surrounded):
    """Random numbers in front of the layer and behind it, as in a variational autoencoder."""

    def __init__(self, branches):
        super().__init__()
        self.branches = branches

    def forward(self, x):
        h = self.into(x + torch.randn(4))
        h = self.dropout(F.dropout(h, 0.5, training=True))
        h = branching_on_a_value(h) if self.branches else h
        return self.out(h + torch.randn_like(h))


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("memory", [2**30, 3_000])
def test_all_ks_see_the_same_random_numbers(branches, memory):
    """With the layer's features all zero, then, all ks have the same loss, whatever the way."""
    model = Noisy(branches)
    nn.init.zeros_(model.into.weight)
    nn.init.zeros_(model.into.bias)
    with pytest.warns(UserWarning, match="by itself") if branches else contextlib.nullcontext():
        result = td.scree(model, squared_error, vectors(8, 8, 1), memory=memory, progress=False)
    assert result.stderr[0] > 0
    assert_close(result.loss, result.loss[:1].expand(5), rtol=1e-6, atol=0)


# --- networks that vmap can't run, or where it is wrong ------------------------------------------


class DataDependent(Surrounded):
    def forward(self, x):
        h = self.dropout(self.into(x))
        return self.out(h.tanh() if h.mean() > 0 else h)


class ThroughNumpy(Surrounded):
    def forward(self, x):
        h = self.dropout(self.into(x)).tanh()
        return self.out(torch.as_tensor(h.numpy(force=True)).exp())


class IntoABuffer(Surrounded):
    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(8, 4))

    def forward(self, x):
        self.buffer[: len(x)].copy_(self.dropout(self.into(x)).tanh())
        return self.out(self.buffer[: len(x)])


class OntoTheResidual(Surrounded):
    """What depends on k is added in place to what does not."""

    def forward(self, x):
        h = self.into(x)
        h += self.dropout(h.tanh())
        return self.out(h.exp())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x


class OwnFunction(Surrounded):
    def forward(self, x):
        return self.out(Doubled.apply(self.dropout(self.into(x)).tanh()))


CANNOT_RUN = [DataDependent, ThroughNumpy, IntoABuffer, OntoTheResidual, OwnFunction]


@pytest.mark.parametrize("memory", [2**30, 3_000])
@pytest.mark.parametrize("network", CANNOT_RUN)
def test_where_vmap_cannot_run_each_k_runs_by_itself_and_a_warning_says_so(network, memory):
    words = "scree of layer 'dropout' runs each k by itself, which is right but slow: .*vmap"
    with pytest.warns(UserWarning, match=words) as warned:
        assert_same_as_loop(network(), squared_error, vectors(8, 8, 5), memory=memory)
    assert len(warned) == 1
    assert warned[0].filename == __file__


def test_a_batch_that_goes_where_vmap_cannot_run():
    class Later(Surrounded):
        def forward(self, x):
            h = self.dropout(self.into(x)).tanh()
            return self.out(branching_on_a_value(h) if len(x) == 5 else h)

    with pytest.warns(UserWarning, match="runs each k by itself"):
        assert_same_as_loop(Later(), squared_error, vectors(8, 5, 8))


class KeepsWhatItSaw(Surrounded):
    def __init__(self):
        super().__init__()
        self.seen, self.listed = None, []
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        output = self.out(self.dropout(self.into(x)).tanh())
        self.seen, self.mean = output, output.mean(0)
        self.listed.append(output)
        return output


def test_nothing_of_a_run_under_vmap_stays_in_the_model():
    model = KeepsWhatItSaw().eval()
    assert_same_as_loop(model, squared_error, vectors(8, 8))
    copy.deepcopy(model)
    kept = [model.seen, model.mean, *model.listed]
    assert all(torch.func.debug_unwrap(tensor) is tensor for tensor in kept)


def test_a_network_that_shows_only_later_that_it_is_not_to_be_trusted():
    (first, target), later = vectors(8, 8)
    assert_same_as_loop(LaterGate(), squared_error, [(-first.abs(), target), later])


@pytest.mark.parametrize("batch_dim", [(), (0, 1), (1, 0)], ids=str)
def test_other_batch_dims(batch_dim):
    """One k for the whole call, or one for each token: to measure, all have the same."""
    model = nn.Sequential(nn.Linear(4, N), TailDropout(batch_dim=batch_dim), nn.Linear(N, 3))
    data = [(torch.randn(size, 5, 4), torch.randn(size, 5, 3)) for size in (4, 3)]
    assert_same_as_loop(model, squared_error, data)


def test_targets_that_are_no_tensors():
    model, data = activation_reader()
    data = [(inputs, target.tolist()) for inputs, target in data]
    assert_same_as_loop(model, lambda o, t: squared_error(o, torch.tensor(t)), data)


# --- Ctrl-C --------------------------------------------------------------------------------------


class Interrupted(nn.Module):
    """As if Ctrl-C came in a certain call."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return x + torch.rand(())


def state(model):
    return [
        [
            (
                module.training,
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
                "forward" in vars(module),
            )
            for module in model.modules()
        ],
        [layer.k for layer in td.tail_dropouts(model).values()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("call", range(1, 20, 3))
@pytest.mark.parametrize("behind", [False, True], ids=["before the layer", "behind it"])
def test_the_model_is_as_it_was_after_ctrl_c_in_it(behind, call):
    stop = Interrupted(call)
    model = nn.Sequential(nn.Linear(4, N), TailDropout(), nn.Dropout(), nn.Linear(N, 3))
    model.insert(2 if behind else 0, stop)
    model[-1].eval()
    td.tail_dropouts(model)["1" if behind else "2"].set_k(3)
    model[-1].bias.grad = torch.ones(3)
    model[-1].register_forward_hook(lambda *_: None)
    data = vectors(*[7] * 20)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        td.scree(model, squared_error, data, progress=False, memory=3_000)
    assert state(model) == before


def test_the_model_is_as_it_was_after_ctrl_c_in_the_data():
    model, data = activation_reader()
    before = state(model)

    def interrupted():
        yield from data
        torch.rand(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        td.scree(model, squared_error, interrupted(), progress=False)
    assert state(model) == before
