"""Widths for several layers under a budget, against equal shrinking and against direct pruning."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import taildropout as td
from benchmarks.by_screes import by_screes
from taildropout.showing.plot import plot_widths

pytestmark = pytest.mark.slow

LAYERS = ["2", "5", "8"]


@pytest.fixture(scope="module")
def digits():
    pixels, classes = (torch.tensor(array) for array in load_digits(return_X_y=True))
    return pixels.float() / 16, classes


@pytest.fixture(scope="module")
def trained(digits):
    """An MLP of three hidden layers of 64."""
    torch.manual_seed(0)
    pixels, classes = digits
    blocks = [
        [nn.Linear(width, 64), nn.ReLU(), td.TailDropout()] for width in (pixels.shape[1], 64, 64)
    ]
    model = nn.Sequential(*(module for block in blocks for module in block), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        index = torch.randint(1200, (128,))
        optimizer.zero_grad()
        cross_entropy(model(pixels[index]), classes[index]).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def held_out(digits):
    pixels, classes = digits
    return [(pixels[1200:], classes[1200:])]


@pytest.fixture(scope="module")
def path(trained, held_out):
    inputs = held_out[0][0][:2]
    return td.choose_widths(trained, nn.CrossEntropyLoss(), held_out, 0.5, inputs)


@torch.no_grad()
def loss_and_parameters(model, widths, held_out):
    (pixels, classes), *_ = held_out
    small = td.prune(model, widths, pixels[:2]).eval()
    return cross_entropy(small(pixels), classes).item(), sum(p.numel() for p in small.parameters())


def test_every_step_is_a_pruned_network_with_its_measured_loss(trained, held_out, path):
    assert path.of == "parameters"
    assert path.steps[0].widths == dict.fromkeys(LAYERS, 64)
    for step in (path.steps[0], path.steps[1], path.steps[-1]):
        loss, parameters = loss_and_parameters(trained, step.widths, held_out)
        assert step.cost == parameters
        assert_close(step.loss, loss, rtol=1e-4, atol=1e-6)
        assert step.stderr > 0


def test_the_path_ends_at_the_first_within_the_budget(path):
    costs = [step.cost for step in path.steps]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] <= 0.5 * costs[0] < costs[-2]
    assert path.widths is path.steps[-1].widths


def test_it_beats_shrinking_all_layers_alike(trained, held_out, path):
    """Against the widest equal layers within the budget, and all those that are smaller."""
    equal = [
        loss_and_parameters(trained, dict.fromkeys(LAYERS, width), held_out)
        for width in range(32, 48)
    ]
    within = [loss for loss, parameters in equal if parameters <= 0.5 * path.steps[0].cost]
    assert 0 < len(within) < len(equal)
    assert path.steps[-1].loss < min(within)


def test_a_budget_of_flops(trained, held_out):
    inputs = held_out[0][0][:2]
    path = td.choose_widths(
        trained, nn.CrossEntropyLoss(), held_out, 0.8, inputs, of="flops", steps=4
    )
    plan = td.plan_pruning(trained, path.widths, inputs)
    assert path.steps[-1].cost == plan.after.flops <= 0.8 * plan.before.flops


def test_the_whole_budget_takes_nothing_away(trained, held_out):
    inputs = held_out[0][0][:2]
    (step,) = td.choose_widths(trained, nn.CrossEntropyLoss(), held_out, 1, inputs).steps
    assert step.widths == dict.fromkeys(LAYERS, 64)


def test_the_model_comes_back_as_it_was(trained, held_out):
    trained.train()
    td.tail_dropouts(trained)["5"].set_k(7)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    td.choose_widths(trained, nn.CrossEntropyLoss(), held_out, 0.9, held_out[0][0][:2], steps=2)
    assert trained.training
    assert [layer.k for layer in td.tail_dropouts(trained).values()] == [None, 7, None]
    for name, tensor in trained.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)
    td.tail_dropouts(trained)["5"].set_k(None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": 0}, r"budget must be a fraction in \(0, 1\], got 0"),
        ({"budget": 1.5}, r"budget must be a fraction in \(0, 1\], got 1.5"),
        ({"budget": 0.001}, "budget 0.001 is too small: layers of one feature exceed it"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"model": nn.Linear(3, 3)}, "must contain a TailDropout layer"),
        ({"data": iter([])}, "pass a list or DataLoader, no generator"),
    ],
)
def test_what_cannot_be_done_is_refused(trained, held_out, change, words):
    arguments = {
        "model": trained,
        "loss": nn.CrossEntropyLoss(),
        "data": held_out,
        "budget": 0.5,
        "example_inputs": held_out[0][0][:2],
    }
    with pytest.raises(ValueError, match=words):
        td.choose_widths(**{**arguments, **change})


def test_the_plot_shows_the_path(path):
    _, ax = plot_widths(path)
    (line,) = ax.lines
    assert line.get_xdata()[0] == 1
    assert line.get_xdata()[-1] <= 0.5
    assert_close(list(line.get_ydata()), [step.loss for step in path.steps], rtol=1e-6, atol=0)


def test_of_steps_that_cost_nothing_the_one_that_saves_most_is_taken():
    """246 parameters, at most 123 to stay: four features of the first layer save 37 each, less than
    needed together; 18 of the 32 of the second, at 7 each, are the fewest that are enough."""
    model = nn.Sequential(
        *(nn.Linear(4, 4), td.TailDropout(), nn.Linear(4, 32)),
        *(td.TailDropout(), nn.Linear(32, 2)),
    )

    def indifferent(output, target):
        return 0 * output[:, 0] + 1

    data = [(torch.randn(8, 4), torch.zeros(8))]
    path = td.choose_widths(model, indifferent, data, 0.5, torch.randn(2, 4), progress=False)
    assert path.widths == {"1": 4, "3": 14}
    assert [step.cost for step in path.steps] == [246, 246 - 18 * 7]


def test_layers_of_groups_get_whole_ones_and_layers_that_are_never_called_none():
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.groups = nn.Linear(4, 12), td.TailDropout(multiple_of=4)
            self.second, self.single = nn.Linear(12, 6), td.TailDropout()
            self.last, self.never = nn.Linear(6, 2), td.TailDropout()

        def forward(self, x):
            return self.last(self.single(self.second(self.groups(self.first(x)))))

    data = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"never calls its TailDropout layers \['never'\]"):
        path = td.choose_widths(
            Groups(), nn.MSELoss(), data, 0.5, data[0][0][:2], steps=6, progress=False
        )
    assert all(step.widths["groups"] % 4 == 0 for step in path.steps)
    assert set(path.widths) == {"groups", "single"}
    assert path.steps[-1].cost <= 0.5 * path.steps[0].cost


# --- what is measured, against a scree of every layer in each round ------------------------------


def ladder():
    blocks = [(nn.Linear(4 if i == 0 else 8, 8), nn.Tanh(), td.TailDropout()) for i in range(4)]
    return nn.Sequential(*(module for block in blocks for module in block), nn.Linear(8, 3)), (4,)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.tail, self.down = nn.Linear(4, 12), td.TailDropout(), nn.Linear(12, 4)

    def forward(self, x):
        return x + self.down(self.tail(self.up(x).relu()))


def residual():
    return nn.Sequential(*(Residual() for _ in range(4)), nn.Linear(4, 3)), (4,)


def convolutional():
    blocks = [
        (nn.Conv2d(2 if i == 0 else 6, 6, 3, padding=1), nn.ReLU(), td.TailDropout(dropout_dim=1))
        for i in range(3)
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(*(module for block in blocks for module in block), *head), (2, 5, 5)


def with_tail_linears():
    blocks = [(nn.Linear(4 if i == 0 else 8, 8), nn.Tanh()) for i in range(3)]
    model = nn.Sequential(*(m for block in blocks for m in block), td.TailLinear(8, 3))
    model[2] = td.TailLinear(8, 8)
    for module in model:
        if isinstance(module, td.TailLinear):
            nn.init.normal_(module.tail_bias)
    return model, (4,)


def batches_for(shape, count=2):
    torch.manual_seed(1)
    return [(torch.randn(20, *shape), torch.randint(3, (20,))) for _ in range(count)]


@pytest.mark.parametrize("budget", [0.7, 0.3])
@pytest.mark.parametrize("network", [ladder, residual, convolutional, with_tail_linears])
def test_the_widths_are_those_of_measuring_and_planning_everything_in_each_round(network, budget):
    torch.manual_seed(0)
    model, shape = network()
    data, loss = batches_for(shape), nn.CrossEntropyLoss()
    inputs = data[0][0][:2]
    path = td.choose_widths(model, loss, data, budget, inputs, steps=6, progress=False)
    expected = by_screes(model.eval(), loss, data, budget, inputs, steps=6)
    assert len(expected) > 1
    assert [step.widths for step in path.steps] == expected
    for step in path.steps:
        plan = td.plan_pruning(model, step.widths, inputs)
        assert step.cost == plan.after.parameters


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_each_round_runs_the_network_once_per_batch_for_each_layer_but_the_one_narrowed_last():
    """Twice as many batches, the same ones again, are measured by as many runs more."""
    torch.manual_seed(0)
    model, shape = ladder()
    model[0] = Counted(4, 8)
    data, calls = batches_for(shape), []
    for repeats in (1, 2):
        before = model[0].calls
        path = td.choose_widths(
            model, nn.CrossEntropyLoss(), data * repeats, 0.5, data[0][0][:2], progress=False
        )
        calls.append(model[0].calls - before)
    rounds, layers = len(path.steps) - 1, 4
    assert rounds > 4
    assert 0 < calls[1] - calls[0] <= len(data) * (layers + (rounds - 1) * (layers - 1))
    checks = 2 * calls[0] - calls[1]  # all that does not depend on the number of batches
    assert checks < 10 * layers
