"""A model that computes only what the width needs, against the same model with masks."""

import copy
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import taildropout as td
from benchmarks.random_networks import draw_network
from taildropout import Elastic, TailDropout, TailLinear, TailMLP
from taildropout.lengths import Exponential, Full, Sizes, Uniform
from taildropout.models.copies import without_cache
from taildropout.models.inputs import call, of_twice_the_batch, tensors_of
from taildropout.pruning.precision import InFloat64

FAST = ("MLP",)
LONG = ("T5", "Swin", "U-Net", "ViT", "ResNet of bottlenecks")
NAMES = [
    pytest.param(
        name,
        marks=[
            *([] if name in FAST else [pytest.mark.slow]),
            *([pytest.mark.long] if name in LONG else []),
        ],
    )
    for name in ARCHITECTURES
]


def nested(*, sizes=(10, 32, 24, 16, 5), lengths=None):
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU())]
    model = nn.Sequential(*layers[:-1]).double()
    td.nest(model, rows(2, sizes[0]), lengths=lengths)
    return model


def rows(count, features=10):
    return torch.randn(count, features, dtype=torch.float64)


def trained(model, forward, inputs, seed=0):
    """Outputs, and the gradients of their squares, with the random numbers of a seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = call(forward, inputs)
    sum(leaf.square().sum() for leaf in tensors_of(output) if leaf.requires_grad).backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


def assert_trains_like_masks(elastic, inputs, seeds=3):
    assert elastic.masked is None
    for seed in range(seeds):
        expected = trained(elastic.model, elastic.model, inputs, seed)
        assert_close(trained(elastic.model, elastic, inputs, seed), expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_trains_and_runs_at_widths_as_it_does_with_masks(name):
    architecture = ARCHITECTURES[name]
    model = without_cache(architecture.make())
    example = architecture.inputs(*architecture.sizes[0])
    td.nest(model, example, streams=architecture.streams)
    elastic = Elastic(model, example, groups=3).train()
    for module in model.modules():
        if not isinstance(module, TailDropout):
            module.training = False  # other dropouts, BatchNorms
    inputs = of_twice_the_batch(of_twice_the_batch(architecture.inputs(*architecture.sizes[-1])))
    with InFloat64():
        assert_trains_like_masks(elastic, inputs, seeds=1)
        with torch.no_grad():
            model.eval()
            for width in (0.25, 0.6, 1.0):
                with td.at_width(elastic, width):
                    assert_close(call(elastic, inputs), call(model, inputs), rtol=1e-9, atol=1e-9)


LENGTHS = {
    "the recipe": None,
    "p = 0.5": Exponential(0.5),
    "p = 0.9": Exponential(0.9),
    "uniform": Uniform(0),
    "a menu": Sizes([4, 8, 1.0]),
    "all": Full(),
}


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_groups_are_exact_for_every_batch(lengths, groups):
    elastic = Elastic(nested(lengths=LENGTHS[lengths]), rows(2), groups=groups).train()
    for samples in (1, 2, 3, 7, 64, 65):
        assert_trains_like_masks(elastic, rows(samples), seeds=2)


def test_layers_of_their_own_kinds():
    torch.manual_seed(0)
    for scale in (None, "sqrt"):
        model = nn.Sequential(
            *(nn.Linear(6, 24), nn.Tanh(), TailLinear(24, 16, scale=scale)),
            *(TailMLP(16, 32, 8, p=0.7), nn.ReLU(), TailDropout(0.3), nn.Linear(8, 3)),
        ).double()
        model[2].tail_bias.data.normal_()
        elastic = Elastic(model, rows(2, 6), groups=3).train()
        assert_trains_like_masks(elastic, rows(40, 6))
        for width in (0.1, 0.5, 1.0):
            with td.at_width(elastic.eval(), width):
                assert_close(elastic(rows(3, 6).fill_(1)), model(rows(3, 6).fill_(1)))


def test_every_layer_may_have_its_own_k_and_none():
    elastic = Elastic(nested(), rows(2), groups=2).eval()
    x = rows(4)
    first, second, third = td.tail_dropouts(elastic)
    for ks in ({first: 0}, {first: 3, third: 1.0}, {first: 5, second: 0.1, third: 2}):
        with td.at_width(elastic, ks):
            assert_close(elastic(x), elastic.model(x))


def test_with_widths_each_sample_is_computed_at_exactly_one():
    widths = [1 / 8, 1 / 2, 1.0]
    elastic = Elastic(nested(), rows(2), widths=widths).train()
    x = rows(30)
    output, grads = trained(elastic.model, elastic, x)
    at = []
    for width in widths:
        with td.at_width(elastic.model, width):
            at.append(elastic.model(x))
    which = torch.stack([(output - one).abs().amax(1) < 1e-12 for one in at])
    assert (which.sum(0) == 1).all()
    assert which.sum(1).tolist() == [10, 10, 10]
    elastic.model.zero_grad()
    torch.where(which.unsqueeze(-1), torch.stack(at), 0).square().sum().backward()
    assert_close(grads, {name: p.grad for name, p in elastic.model.named_parameters()})
    again, _ = trained(elastic.model, elastic, x, seed=1)
    assert not torch.equal(again, output)  # other samples at other widths


def test_each_width_has_its_share_of_small_batches_too():
    elastic = Elastic(nested(), rows(2), widths=[1 / 8, 1 / 2, 1.0]).train()
    torch.manual_seed(0)
    drawn = []
    for _ in range(600):
        elastic(rows(2))
        drawn += next(iter(td.tail_dropouts(elastic.model).values())).drawn_k.tolist()
    counts = torch.tensor([drawn.count(k) for k in (4, 16, 32)])
    assert counts.sum() == 1200
    assert ((counts - 400).abs() < 100).all()  # six standard deviations of as many tosses


def test_what_was_drawn_can_be_seen():
    elastic = Elastic(nested(), rows(2), groups=3).train()
    torch.manual_seed(3)
    elastic(rows(20))
    drawn = [layer.drawn_k for layer in td.tail_dropouts(elastic.model).values()]
    torch.manual_seed(3)
    elastic.model(rows(20))
    assert_close(drawn, [layer.drawn_k for layer in td.tail_dropouts(elastic.model).values()])


def flops(forward, inputs):
    with FlopCounterMode(display=False) as counter:
        forward(inputs).sum().backward()
    return counter.get_total_flops()


def test_the_tails_are_not_computed():
    model = nested(sizes=(64, 256, 256, 256, 4), lengths=Exponential(0.8))
    elastic = Elastic(model, rows(2, 64), groups=8).train()
    x = rows(256, 64)
    assert flops(elastic, x) < flops(model, x) / 4  # both sides of a matrix lose 80 %, on average
    small = td.prune(model, 0.25, x)
    with td.at_width(elastic, 0.25):
        elastic(x)  # plans
        assert flops(elastic, x) == flops(small, x)


def test_networks_have_no_weights_of_their_own():
    model = nested()
    elastic = Elastic(model, rows(2), groups=3)
    assert elastic.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
    assert list(elastic.parameters()) == list(model.parameters())
    data = {p.untyped_storage().data_ptr() for p in model.parameters()}
    elastic.train()(rows(9))
    with td.at_width(elastic.eval(), 0.5), torch.no_grad():
        elastic(rows(2))
    for network in elastic._networks.values():
        own = {p.untyped_storage().data_ptr() for p in network.network.parameters()}
        assert own <= data


def test_weights_that_change_are_seen_at_once():
    elastic = Elastic(nested(), rows(2), groups=3)
    model, x = elastic.model, rows(5)
    other = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    changes = [
        lambda: model.load_state_dict(other),
        lambda: model.load_state_dict({n: -v for n, v in other.items()}, assign=True),
        lambda: model[0].weight.data.mul_(2),
        lambda: setattr(model[2].weight, "data", torch.randn_like(model[2].weight)),
        lambda: setattr(model[4], "bias", nn.Parameter(torch.ones_like(model[4].bias))),
    ]
    for change in changes:
        with torch.no_grad(), td.at_width(elastic.eval(), 0.5):
            before = elastic(x)
            change()
            assert not torch.equal(before, elastic(x))
            assert_close(elastic(x), model(x))
        elastic.train()
        assert_trains_like_masks(elastic, x, seeds=1)


def test_lengths_may_change():
    elastic = Elastic(nested(lengths=Sizes([4])), rows(2), groups=4).train()
    for lengths in (Sizes([2]), Uniform(), Exponential(0.5), Full(), Exponential(0.9)):
        for layer in td.tail_dropouts(elastic.model).values():
            layer.lengths = lengths
        assert_trains_like_masks(elastic, rows(33))


def test_gradients_add_up_over_calls():
    elastic = Elastic(nested(), rows(2), groups=3).train()
    x = rows(24)

    def accumulated(forward):
        elastic.model.zero_grad()
        torch.manual_seed(0)
        outputs = [forward(part) for part in x.split(8)]  # all of them before any backward
        for output in outputs:
            output.square().sum().backward()
        return [p.grad for p in elastic.model.parameters()]

    assert_close(accumulated(elastic), accumulated(elastic.model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint_the_same_groups_are_computed_again(reentrant):
    elastic = Elastic(nested(), rows(2), groups=3).train()
    x = rows(24).requires_grad_()
    expected = trained(elastic.model, elastic, x)
    actual = trained(elastic.model, lambda x: checkpoint(elastic, x, use_reentrant=reentrant), x)
    assert_close(actual, expected)


def test_under_autocast():
    elastic = Elastic(nested().float(), rows(2).float(), groups=3).train()
    x = rows(40).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = trained(elastic.model, elastic.model, x)
        actual = trained(elastic.model, elastic, x)
    assert actual[0].dtype is torch.bfloat16
    assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_second_derivatives():
    elastic = Elastic(nested(), rows(2), groups=3).train()
    x = rows(12).requires_grad_()

    def penalty(forward):
        torch.manual_seed(0)
        (grad,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(elastic.model.parameters())[:3])

    assert_close(penalty(elastic), penalty(elastic.model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_elastic_too(copied):
    elastic = Elastic(nested(), rows(2), groups=3).train()
    elastic(rows(8)).sum().backward()
    other = copied(elastic)
    assert other.model is not elastic.model
    x = rows(9)
    assert_close(trained(other.model, other, x), trained(elastic.model, elastic, x))
    assert_trains_like_masks(other, x)


# Inductor, and what it loads, announce the end of torch.jit.script.
compiles = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"
)


@compiles
@pytest.mark.slow
def test_each_network_is_compiled():
    elastic = Elastic(nested(), rows(2), groups=10).train()
    x = rows(40)
    expected = trained(elastic.model, elastic.model, x)
    elastic.compile()
    assert_close(trained(elastic.model, elastic, x), expected)
    with torch.no_grad(), td.at_width(elastic.eval(), 0.5):
        small = td.prune(nested(), 0.5, x).eval()
        assert_close(elastic(x), small(x))


@compiles
@pytest.mark.slow
def test_torch_compile_leaves_it_to_itself():
    elastic = Elastic(nested(), rows(2), groups=3).train()
    x = rows(40)
    expected = trained(elastic.model, elastic, x)
    assert_close(trained(elastic.model, torch.compile(elastic), x), expected)


# --- where masks remain --------------------------------------------------------------------------


def assert_masks(elastic, inputs, words):
    """It says so, once, and computes what the model does."""
    with pytest.warns(UserWarning, match=words):
        actual = trained(elastic.model, elastic, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = trained(elastic.model, elastic, inputs)
    expected = trained(elastic.model, elastic.model, inputs)
    assert_close(actual, expected)
    assert_close(again, expected)


def test_a_constant_that_would_have_to_be_folded_is_left_to_masks():
    model = nn.Sequential(nn.Linear(4, 8), TailDropout(), nn.Sigmoid(), nn.Linear(8, 2)).double()
    elastic = Elastic(model, rows(2, 4)).train()
    assert_masks(elastic, rows(9, 4), "'3.bias' would have to take in a constant")
    with td.at_width(elastic.eval(), 0.5):
        assert_close(elastic(rows(3, 4).fill_(1)), model(rows(3, 4).fill_(1)))


def test_statistics_of_the_whole_batch_are_left_to_masks():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    ).double()
    x = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    td.nest(model, x)
    elastic = Elastic(model, x, groups=3)
    assert elastic.masked is None
    assert_masks(
        elastic.train(), x, "BatchNorm in training mode takes its statistics from the whole"
    )
    for module in model.modules():
        module.training = isinstance(module, TailDropout)
    assert_trains_like_masks(elastic, x)


def test_with_widths_masks_have_them_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), TailDropout(), nn.Linear(16, 3))
    ).double()
    elastic = Elastic(model, rows(4), widths=[0.25, 1.0]).train()
    with pytest.warns(UserWarning, match="whole batch"):
        elastic(rows(20))
    assert model[3].drawn_k.sort().values.tolist() == [4] * 10 + [16] * 10
    torch.manual_seed(1)
    x = rows(20)
    torch.manual_seed(2)
    output = elastic(x)
    with model[3].using_k(model[3].drawn_k):
        assert_close(output, model(x))


class Centred(nn.Module):
    """Samples that depend on the others of their batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h) - self.second(h).mean(0)


def test_samples_that_depend_on_each_other_are_left_to_masks():
    model = Centred().double()
    td.nest(model, rows(4))
    assert_masks(Elastic(model, rows(4)).train(), rows(9), "depends on the others of its batch")


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nested()

    def forward(self, x, target=None):
        output = self.net(x)
        return output if target is None else ((output - target) ** 2).mean()


def test_a_loss_inside_the_model_is_refused():
    elastic = Elastic(WithLoss(), rows(2), groups=3).train()
    with pytest.raises(TypeError, match="must return one row for each sample"):
        elastic(rows(8), rows(8, 5))


def test_ks_of_single_samples_are_left_to_masks():
    elastic = Elastic(nested(), rows(2), groups=3).eval()
    layer = next(iter(td.tail_dropouts(elastic).values()))
    layer.set_k(torch.tensor([1, 5, 32]))
    x = rows(3)
    assert_close(elastic(x), elastic.model(x), rtol=0, atol=0)


def test_in_eval_it_is_the_model():
    elastic = Elastic(nested(), rows(2)).eval()
    x = rows(3)
    assert torch.equal(elastic(x), elastic.model(x))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"widths": []}, ValueError, "at least one width"),
        ({"widths": [0.5, 2]}, ValueError, "2"),
    ],
)
def test_what_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Elastic(nested(), rows(2), **arguments)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="must contain a TailDropout"):
        Elastic(nn.Linear(3, 3), torch.randn(2, 3))


def test_inputs_must_tell_the_number_of_samples():
    elastic = Elastic(nested(), rows(2), groups=2).train()
    with pytest.raises(ValueError, match="inputs must tell how many samples"):
        elastic(torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model runs with masks")
def test_random_networks_train_as_they_do_with_masks():
    """Where groups can't be exact there are masks, as where code reads the size of the batch (30,
    189 and 250); mostly they can."""
    grouped = 0
    for network in map(draw_network, [*range(8), 30, 189, 250]):
        model, inputs = network.build(), network.example()
        for module in model.modules():
            module.training = isinstance(module, TailDropout)
        elastic = Elastic(model, inputs, groups=3)
        grouped += elastic.masked is None
        for seed in range(2):
            expected = trained(model, model, copy.deepcopy(inputs), seed)
            actual = trained(model, elastic, copy.deepcopy(inputs), seed)
            assert_close(actual, expected, rtol=1e-6, atol=1e-8, equal_nan=True)
    assert grouped == 8
