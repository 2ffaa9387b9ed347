"""The recipe in a training loop: which lengths are drawn when, ordered once, resumed anywhere."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout, lengths
from taildropout.lengths import AtLeast, Full

OWN = lengths.Sizes([2, 8])


def network(own=OWN):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), TailDropout(lengths=own), nn.Linear(8, 4))


def drawn(model, samples=400):
    """The ks that the layers draw now."""
    model.train()(torch.randn(samples, 4))
    return [set(layer.drawn_k.tolist()) for layer in td.tail_dropouts(model).values()]


def train(model, optimizer, schedule, batches):
    """One step for each; the outputs after it."""
    for x in batches:
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        yield model.eval()(x).detach()
        model.train()


# ------------------------------------------------------------------------------- which lengths


@pytest.mark.parametrize(("total", "plain", "boundary"), [(10, 0.4, 4), (10, 0.0, 0), (3, 0.1, 1)])
def test_full_width_in_the_plain_share_then_the_layers_own_lengths(total, plain, boundary):
    model = network()
    schedule = td.Schedule(model, total, plain=plain)
    for step in range(total + 3):  # beyond the end too
        assert drawn(model) == ([{8}] if step < boundary else [{2, 8}])
        schedule.step()
    assert drawn(model) == [{2, 8}]
    assert schedule.steps == total + 3


def test_the_default_is_two_fifths_plain():
    assert td.Schedule(network(), 1000).plain_steps == 400


@pytest.mark.parametrize(
    ("own", "smallest"), [(lengths.Uniform(), [4, 2, 1, 1, 1]), (None, [4, 2, 1, 1, 0])]
)
def test_the_smallest_width_shrinks_in_halves(own, smallest):
    model = network(own)
    schedule = td.Schedule(model, 10, plain=0.2, shrink=0.4)
    seen = []
    for _ in range(10):
        seen.append(min(drawn(model)[0]))
        schedule.step()
    assert seen == [8, 8, *smallest, *smallest[-1:] * 3]
    assert model[2].lengths is own


def test_lengths_may_be_given():
    model = network(None)
    schedule = td.Schedule(model, 2, plain=0.5, lengths=lengths.Sizes([3]))
    schedule.step()
    assert drawn(model) == [{3}]


def test_layers_that_are_drawn_together_stay_so():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    td.nest(model, torch.randn(2, 4))
    schedule = td.Schedule(model, 10)
    assert drawn(model) == [{8}, {16}]
    for _ in range(4):
        schedule.step()
    drawn(model)
    first, second = (layer.drawn_k for layer in td.tail_dropouts(model).values())
    assert len(first.unique()) > 4
    assert not ((first[:, None] < first) & (second[:, None] > second)).any()


def test_a_tail_mlp_and_a_tail_linear_draw_as_they_are_told():
    model = nn.Sequential(
        td.TailMLP(4, 8, 4, lengths=OWN), td.TailLinear(4, 4, lengths=lengths.Sizes([1]))
    )
    schedule = td.Schedule(model, 2, plain=0.5)
    assert drawn(model) == [{8}, {4}]
    schedule.step()
    assert drawn(model) == [{2, 8}, {1}]


# ------------------------------------------------------------------------------------- ordered


def in_training(seed=0, **options):
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    data = [torch.randn(64, 4) for _ in range(2)]
    schedule = td.Schedule(model, 10, data=data, optimizer=optimizer, **options)
    return model, optimizer, schedule


BATCHES = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(20)]


def test_the_features_are_put_in_order_at_the_end_of_the_plain_share():
    """Training goes on from there as without it: only the features have changed places."""
    model, optimizer, schedule = in_training()
    other, others, without = copy.deepcopy((model, optimizer, schedule))
    without.data = None
    for steps in range(4):
        assert schedule.ordering is None, steps
        outputs = [
            list(train(m, o, s, BATCHES[steps : steps + 1]))
            for m, o, s in ((model, optimizer, schedule), (other, others, without))
        ]
        assert_close(*outputs)
    assert schedule.ordering is not None
    new, old = model[0].weight, other[0].weight
    rows = [int((old == row).all(1).nonzero()) for row in new]
    assert sorted(rows) == list(range(8))
    assert rows != list(range(8))
    moments, others_moments = (o.state[w]["exp_avg"] for o, w in ((optimizer, new), (others, old)))
    assert torch.equal(moments, others_moments[rows])


def test_it_is_ordered_once():
    model, optimizer, schedule = in_training()
    list(train(model, optimizer, schedule, BATCHES[:4]))
    first = schedule.ordering
    weight = model[0].weight.clone()
    for _ in range(10):
        schedule.step()
    assert schedule.ordering is first
    assert torch.equal(model[0].weight, weight)


def test_a_linear_bottleneck_is_turned_where_that_can_be_done():
    for make, how in ((torch.optim.Adam, "rotation"), (torch.optim.Rprop, "permutation")):
        model = nn.Sequential(nn.Linear(4, 8), TailDropout(), nn.Linear(8, 4))
        optimizer = make(model.parameters())
        schedule = td.Schedule(model, 5, data=[torch.randn(64, 4)], optimizer=optimizer)
        list(train(model, optimizer, schedule, BATCHES[:2]))
        assert f" {how} " in schedule.ordering


@pytest.mark.parametrize("by", ["saliency", "greedy"])
def test_with_a_loss(by):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = [(x, x) for x in BATCHES]
    schedule = td.Schedule(
        model, 5, data=data, loss=nn.MSELoss(), by=by, optimizer=optimizer, samples=64
    )
    list(train(model, optimizer, schedule, BATCHES[:2]))
    assert schedule.ordering.startswith(f"by {by}")


# ------------------------------------------------------------------------------------- resumed


@pytest.mark.parametrize("at", [0, 2, 3, 4, 5, 9])
def test_resuming_from_files_goes_on_as_if_nothing_had_happened(at):
    model, optimizer, schedule = in_training(shrink=0.4)
    list(train(model, optimizer, schedule, BATCHES[:at]))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], file)
    file.seek(0)

    other, others, resumed = in_training(seed=1, shrink=0.4)
    resumed.data = schedule.data
    for part, state in zip((other, others, resumed), torch.load(file), strict=True):
        part.load_state_dict(state)
    runs = []
    for three in ((model, optimizer, schedule), (other, others, resumed)):
        torch.manual_seed(2)
        runs.append(list(train(*three, BATCHES[at:12])))
    assert_close(*runs, rtol=0, atol=0)
    assert resumed.state_dict() == schedule.state_dict()
    assert resumed.ordering is not None


def test_it_is_copied_and_pickled_with_its_model():
    three = in_training()
    list(train(*three, BATCHES[:2]))
    torch.manual_seed(3)
    expected = None
    for copies in (copy.deepcopy(three), pickle.loads(pickle.dumps(three)), three):
        torch.manual_seed(3)
        outputs = list(train(*copies, BATCHES[2:8]))
        assert drawn(copies[0]) == [{2, 8}]
        expected = outputs if expected is None else expected
        assert_close(outputs, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------ compiled


@pytest.mark.slow
def test_compiled_code_is_compiled_anew_at_the_boundary_only():
    torch._dynamo.reset()
    counter = CompileCounter()
    model = network()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedule = td.Schedule(compiled, 10)
    frames = []
    for _ in range(10):
        compiled(torch.randn(16, 4))
        frames.append(counter.frame_count)
        schedule.step()
    assert frames == [1] * 4 + [2] * 6
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------- wrong use


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("total", "options", "words"),
    [
        (0, {}, "total_steps must be an int of at least 1, got 0"),
        (2.5, {}, "total_steps must be an int"),
        (10, {"plain": 1.0}, r"shares of the steps in \[0, 1\)"),
        (10, {"plain": 0.6, "shrink": 0.5}, "together at most 1"),
        (10, {"plain": -0.1}, "shares of the steps"),
        (10, {"data": [torch.randn(8, 4)]}, "pass the optimizer too"),
    ],
)
def test_wrong_use(total, options, words):
    with pytest.raises(ValueError, match=words):
        td.Schedule(network(), total, **options)


def test_no_layers():
    with pytest.raises(ValueError, match="must have TailDropout layers to be scheduled"):
        td.Schedule(nn.Linear(4, 4), 10)


def test_a_second_schedule_would_never_nest():
    model = network()
    td.Schedule(model, 10)
    with pytest.raises(ValueError, match="pass what they should draw, lengths="):
        td.Schedule(model, 10)
    schedule = td.Schedule(model, 10, lengths=OWN)
    schedule.load_state_dict({"steps": 4, "ordering": None})
    assert drawn(model) == [{2, 8}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plain": 0.0}, "call td.order before training"),
        ({"data": iter(BATCHES)}, "gone through once"),
        ({"by": "saliency"}, "needs a loss"),
        ({"data": []}, "at least one batch"),
    ],
)
def test_what_could_not_be_ordered_is_refused_at_the_start(options, words):
    model = network()
    options = {"data": BATCHES, "optimizer": optimizer_of(model), **options}
    with pytest.raises(ValueError, match=words):
        td.Schedule(model, 10, **options)
    assert model[2].lengths is OWN


def test_a_state_of_something_else_is_refused():
    schedule = td.Schedule(network(), 10)
    with pytest.raises(ValueError, match="must be that of a Schedule"):
        schedule.load_state_dict({"last_epoch": 3})


def test_the_layers_of_a_wrapped_model_are_found():
    assert isinstance(network()[2].lengths, lengths.Sizes)
    model = nn.DataParallel(network())
    td.Schedule(model, 10, shrink=0.2)
    assert isinstance(model.module[2].lengths, Full)
    schedule = td.Schedule(network(), 10, plain=0.0, shrink=0.5)
    assert isinstance(schedule.layers[0].lengths, AtLeast)
