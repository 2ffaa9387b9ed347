"""Networks drawn together, against the uniforms that they report and the same network unchecked."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import taildropout as td
from taildropout import TailDropout, TailMLP, at_width, draw_together, tail_dropouts
from taildropout.lengths import Exponential, Full, LogUniform, Mixed, Sizes, Uniform

WIDTHS = [Exponential(0.3), Uniform(), Mixed([Full(), LogUniform()])]


class Network(nn.Module):
    """A residual network of blocks with other n and lengths, `blocks.i.2`, and a nn.Dropout each."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6, n), nn.Dropout(0.2), TailDropout(lengths=lengths), nn.Linear(n, 6)
            )
            for n, lengths in zip((8, 20, 7), WIDTHS, strict=True)
        )
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            run = block if self.checkpointed is None else self.checkpointed
            x = x + (block(x) if run is block else run(block, x))
        return x


def drawn(model):
    return [layer.drawn_k for layer in tail_dropouts(model).values()]


def of_one_width(*ks):
    """Whether a sample with a larger k in one layer never has a smaller one in another."""
    signs = [(k[:, None] - k).sign() for k in ks]
    return all(bool((one * other >= 0).all()) for one in signs for other in signs)


def quantile(lengths, n, u):
    """By its definition: the smallest k with P(K <= k) > u."""
    pmf = lengths.pmf(n).tolist()
    return torch.tensor(
        [next(k for k in range(n + 1) if sum(pmf[: k + 1]) > x) for x in u.tolist()]
    )


# --- a pass -------------------------------------------------------------------------------------


def test_each_layer_takes_its_own_quantile_of_one_uniform_per_sample():
    model = Network()
    handle = draw_together(model)
    assert handle.drawn_u is None
    for _ in range(5):
        model(torch.randn(50, 5))
        for k, n, lengths in zip(drawn(model), (8, 20, 7), WIDTHS, strict=True):
            assert_close(k, quantile(lengths, n, handle.drawn_u))
    assert not of_one_width(torch.arange(50), drawn(model)[0])


def test_apart_they_are_not_of_one_width():
    model = Network()
    model(torch.randn(50, 5))
    assert not of_one_width(*drawn(model))


def test_a_pass_is_stratified_and_each_k_distributed_as_before(assert_drawn_from):
    model = Network()
    handle = draw_together(model)
    model(torch.randn(5000, 5))
    strata = (handle.drawn_u * 5000).floor().to(int)
    assert_close(strata.sort().values, torch.arange(5000))
    for k, n, lengths in zip(drawn(model), (8, 20, 7), WIDTHS, strict=True):
        assert_drawn_from(k, lengths.pmf(n))
    of_the_first_sample = []
    for _ in range(500):
        model(torch.randn(4, 5))
        of_the_first_sample.append(int(handle.drawn_u[0] * 8))
    assert_drawn_from(of_the_first_sample, torch.full((8,), 1 / 8))


def test_the_mask_is_that_of_the_ks():
    model = Network().double()
    draw_together(model)
    x = torch.randn(9, 5).double()
    for block in model.blocks:
        block[1].p = 0.0
    output, ks = model(x), drawn(model)
    for layer, k in zip(tail_dropouts(model).values(), ks, strict=True):
        layer.set_k(k)
    assert_close(model(x), output)


def test_only_layers_that_match_are_drawn_together():
    model = Network()
    handle = draw_together(model, "re:blocks.[02].*")
    assert list(handle.layers) == ["blocks.0.2", "blocks.2.2"]
    model(torch.randn(50, 5))
    first, second, third = drawn(model)
    assert of_one_width(first, third)
    assert not of_one_width(first, second)


def test_two_groups_of_one_network_have_draws_of_their_own():
    model = Network()
    draw_together(model, "blocks.0*")
    draw_together(model, "blocks.[12]*")
    model(torch.randn(50, 5))
    first, second, third = drawn(model)
    assert of_one_width(second, third)
    assert not of_one_width(first, second)


def test_a_later_call_takes_layers_over():
    model = Network()
    first = draw_together(model)
    second = draw_together(model)
    model(torch.randn(50, 5))
    assert first.drawn_u is None
    assert of_one_width(*drawn(model), second.drawn_u)
    first.remove()
    model(torch.randn(50, 5))
    assert of_one_width(*drawn(model), second.drawn_u)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


def test_remove_leaves_nothing():
    model, plain = Network(), Network()
    plain.load_state_dict(model.state_dict())
    handle = draw_together(model)
    keys = list(model.state_dict())
    model(torch.randn(3, 5))
    handle.remove()
    for module in model.modules():
        kept = [value for name, value in vars(module).items() if "_hooks" in name]
        assert not any(kept)
    x = torch.randn(30, 5)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert_close(model(x), expected)
    assert keys == list(plain.state_dict())


def test_a_part_that_is_called_by_itself_has_a_pass_of_its_own():
    model = nn.Sequential(Network(), Network())
    handle = draw_together(model)
    model[0](torch.randn(50, 5))
    assert of_one_width(*drawn(model[0]), handle.drawn_u)
    (before,) = {handle.drawn_u}
    model[1].blocks[0](torch.randn(3, 6))
    assert handle.drawn_u.shape == (3,)
    assert of_one_width(model[1].blocks[0][2].drawn_k, handle.drawn_u)
    assert before.shape == (50,)


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer.forward(x)])
def test_a_layer_that_is_called_by_itself_is_a_pass(call, assert_drawn_from):
    model = nn.Sequential(TailDropout(), TailDropout())
    handle = draw_together(model)
    call(model[1], torch.ones(5000, 6))
    assert handle.drawn_u.shape == (5000,)
    assert_drawn_from(model[1].drawn_k, Exponential(0.5).pmf(6))


def test_a_model_that_is_one_layer():
    handle = draw_together(layer := TailDropout())
    layer(torch.ones(8, 4))
    assert_close(layer.drawn_k, quantile(Exponential(0.5), 4, handle.drawn_u))


def test_several_calls_are_one_pass_if_one_says_so():
    model = nn.ModuleDict({"encoder": Network(), "decoder": Network()})
    handle = draw_together(model)
    x = torch.randn(50, 5)
    with handle.one_pass():
        model.encoder(x)
        first = handle.drawn_u
        with handle.one_pass():  # which goes on
            model.decoder(x)
    assert first is None
    assert of_one_width(*drawn(model), handle.drawn_u)
    model.encoder(x)
    model.decoder(x)
    assert not of_one_width(*drawn(model))
    with handle.one_pass(samples=7), pytest.raises(ValueError, match="50 rows for 7 samples"):
        model.encoder(x)
    model.encoder(x)


def test_a_module_that_is_called_twice_draws_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(TailDropout(), nn.Identity())

        def forward(self, x):
            return self.net(x), self.net(x)

    model = Twice()
    draw_together(model)
    one, other = model(torch.ones(20, 6))
    assert_close(one, other)


def test_a_module_that_calls_itself_is_refused_but_in_one_pass():
    class Recursive(nn.Sequential):
        def forward(self, x, depth=2):
            return super().forward(self(x, depth - 1) if depth else x)

    model = Recursive(TailDropout(lengths=Uniform()))
    handle = draw_together(model)
    with pytest.raises(RuntimeError, match=r"a pass of Recursive ended inside itself.*one_pass"):
        model(torch.ones(20, 6))
    with handle.one_pass():
        output = model(torch.ones(20, 6))
    assert_close(output.sum(1), model[0].drawn_k.float())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["root", "part"])
def test_after_an_error_in_the_middle_the_next_pass_is_a_new_one(error, where):
    model = nn.Sequential(Network(), Network())
    handle = draw_together(model)
    called = model if where == "root" else model[0]

    def fail(*_):
        raise error

    hook = model[0].blocks[1].register_forward_hook(fail)
    with pytest.raises(error):
        called(torch.randn(50, 5))
    hook.remove()
    model[1] = nn.Identity()
    for samples in (50, 30):
        called(torch.randn(samples, 5))
        assert of_one_width(*drawn(model[0]), handle.drawn_u)
        assert handle.drawn_u.shape == (samples,)


# --- modes --------------------------------------------------------------------------------------


def test_in_eval_nothing_is_touched():
    model = Network().eval()
    handle = draw_together(model)
    plain = Network().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(20, 5)
    state = torch.get_rng_state()
    for forward in (lambda: model(x), lambda: model.blocks[0](torch.ones(2, 6))):
        forward()
    with handle.one_pass():
        assert_close(model(x), plain(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert handle.drawn_u is None
    assert drawn(model) == [None] * 3


def test_threads_evaluate_at_once():
    model = Network().eval()
    draw_together(model)
    x = torch.randn(20, 5)
    barrier = threading.Barrier(4)

    def evaluate(_):
        barrier.wait(timeout=60)
        return [model(x) for _ in range(20)]

    with at_width(model, 0.5):
        expected = model(x)
        with ThreadPoolExecutor(4) as pool:
            for outputs in pool.map(evaluate, range(4)):
                for output in outputs:
                    assert_close(output, expected)


def test_layers_in_training_inside_a_model_in_eval():
    model = Network().eval()
    handle = draw_together(model)
    for layer in handle.layers.values():
        layer.train()
    model(torch.randn(50, 5))
    assert of_one_width(*drawn(model), handle.drawn_u)


def test_what_is_set_wins():
    model = Network()
    draw_together(model)
    model.blocks[0][1].p = 0.0
    with at_width(model, 0.5):
        model(torch.randn(50, 5))
        assert drawn(model) == [None] * 3
        assert (model.blocks[0][:3](torch.ones(3, 6)) != 0).sum(1).tolist() == [4, 4, 4]
    model.blocks[1][2].set_k(3)
    model(torch.randn(50, 5))
    first, second, third = drawn(model)
    assert second is None
    assert of_one_width(first, third)


# --- how many samples, how many rows ------------------------------------------------------------


class Taking(nn.Module):
    """Calls its layer with so many rows, whatever the inputs are."""

    main_input_name = "ids"

    def __init__(self, rows=12):
        super().__init__()
        self.layer = TailDropout()
        self.rows = rows

    def forward(self, *args, **kwargs):
        return self.layer(torch.ones(self.rows, 4))


TWELVE, OTHER = torch.ones(12, 3), torch.ones(5)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((TWELVE, OTHER), {}),
        ((None, 2.0, TWELVE, OTHER), {}),
        ((torch.tensor(3), TWELVE), {}),
        (([1, TWELVE], OTHER), {}),
        (({"x": TWELVE, "y": OTHER},), {}),
        ((OTHER,), {"mask": OTHER, "ids": TWELVE}),
        ((), {"ids": None, "mask": TWELVE}),
        ((), {"batch": {"x": (OTHER,), "y": TWELVE}}),
        ((), {}),
        (([[TWELVE]],), {}),
    ],
)
def test_the_inputs_say_how_many_samples_there_are(args, kwargs):
    model = Taking()
    handle = draw_together(model)
    model(*args, **kwargs)
    assert handle.drawn_u.shape == (12,)


@pytest.mark.parametrize("rows", [5, 13, 24, 0, 1])
def test_by_default_rows_are_samples(rows):
    model = Taking(rows)
    handle = draw_together(model)
    with pytest.raises(ValueError, match=rf"got {rows} rows for 12 samples.*rows='adjacent'"):
        model(TWELVE)
    with handle.one_pass():
        model(TWELVE)  # the layer decides
    assert handle.drawn_u.shape == (rows,)


@pytest.mark.parametrize("rows", ["adjacent", "strided"])
def test_several_rows_of_a_sample(rows):
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.many = TailDropout(lengths=Uniform()), TailDropout(lengths=Uniform())

        def forward(self, x):  # (batch, n)
            if rows == "adjacent":
                folded = x[:, None].expand(-1, 3, -1).flatten(0, 1)
            else:
                folded = x.repeat(3, 1)
            return self.one(x), self.many(folded)

    model = Folding()
    draw_together(model, rows=rows)
    one, many = model(torch.ones(12, 30))
    unfolded = many.unflatten(0, (12, 3) if rows == "adjacent" else (3, 12))
    assert_close(unfolded, (one[:, None] if rows == "adjacent" else one).expand_as(unfolded))
    model = Taking(13)
    draw_together(model, rows=rows)
    with pytest.raises(ValueError, match=f"13 rows for 12 samples: with rows='{rows}' the same"):
        model(TWELVE)


def test_towers_of_other_batch_sizes_are_passes_of_their_own():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = Network(), Network()

        def forward(self, text, image):
            return self.text(text), self.image(image)

    model = Towers()
    handle = draw_together(model)
    text, image = torch.randn(20, 5), torch.randn(30, 5)
    with pytest.raises(ValueError, match=r"30 rows for 20 samples.*call each part by itself"):
        model(text, image)
    for tower, x in ((model.text, text), (model.image, image)):
        tower(x)
        assert of_one_width(*drawn(tower), handle.drawn_u)


def test_one_k_per_token():
    model = nn.Sequential(*[TailDropout(batch_dim=(0, 1), lengths=Uniform()) for _ in range(2)])
    handle = draw_together(model)
    model(torch.ones(4, 6, 9))
    assert_close(model[0].drawn_k, model[1].drawn_k)
    assert handle.drawn_u.shape == (24,)
    assert_close(model[0].drawn_k, quantile(Uniform(), 9, handle.drawn_u).view(4, 6))


def test_one_k_per_call():
    model = nn.Sequential(*[TailDropout(batch_dim=(), lengths=Uniform()) for _ in range(2)])
    draw_together(model)
    ks = []
    for _ in range(20):
        model(torch.ones(4, 50))
        assert_close(model[0].drawn_k, model[1].drawn_k)
        ks.append(model[0].drawn_k.item())
    assert len(set(ks)) > 10


def test_another_batch_dim_is_that_of_the_first_layer():
    model = nn.Sequential(TailDropout(batch_dim=1), TailDropout(batch_dim=1))
    handle = draw_together(model)
    model(torch.ones(3, 7, 20))
    assert handle.drawn_u.shape == (7,)
    assert_close(model[0].drawn_k, model[1].drawn_k)


def test_what_cannot_be_meant_is_refused():
    model = Network()
    with pytest.raises(ValueError, match=r"\['blocks.0.2', .*none fits 'nothing'"):
        draw_together(model, "nothing")
    with pytest.raises(ValueError, match=r"layers of the model, \[\], and none"):
        draw_together(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'adjacent', 'strided' or None, got 'beside'"):
        draw_together(model, rows="beside")
    mixed = nn.Sequential(TailDropout(batch_dim=(0, 1)), TailDropout())
    with pytest.raises(ValueError, match=r"all one per token.*{'0': \(0, 1\), '1': \(0,\)}"):
        draw_together(mixed)


def test_data_parallel_is_refused_in_training():
    model = Network()
    draw_together(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"nn.DataParallel.*use DistributedDataParallel"):
        replica(torch.randn(3, 5))
    replica.eval()
    for module in replica.modules():
        module.training = False
    replica(torch.randn(3, 5))


# --- TailMLP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "times"), [(None, 1), ("adjacent", 4), ("strided", 4)])
def test_a_tail_mlp_is_the_sequential_of_the_same_draw(rows, times):
    mlp = TailMLP(5, 96, 4, p=0.7, blocks=6).double()
    both = nn.ModuleList([mlp, mlp.to_sequential()])
    both[1][2] = TailDropout(0.7)
    handle = draw_together(both, rows=rows)
    x = torch.randn(8 * times, 5).double()
    for _ in range(20):
        with handle.one_pass(samples=8):
            actual, expected = both[0](x), both[1](x)
        assert_close(actual, expected)
        assert_close(mlp.dropout.drawn_k, both[1][2].drawn_k)
    gradients = [torch.autograd.grad(y.square().sum(), mlp.fc1.weight) for y in (actual, expected)]
    assert_close(*gradients)


# --- activation checkpointing -------------------------------------------------------------------


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def to_the_end(block, x):
    return checkpoint(block, x, use_reentrant=False, early_stop=False)


def nested(outer, inner):
    def run(block, x):
        return outer(lambda y: inner(block[3], inner(block[:3], y)), x)

    return run


# torch says this of a reentrant checkpoint inside another one, whose forward records nothing.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
BOTH = pytest.mark.parametrize("run", [reentrant, not_reentrant])
WAYS = {
    "reentrant": reentrant,
    "not reentrant": not_reentrant,
    "to the end": to_the_end,
    "nested": nested(not_reentrant, not_reentrant),
    "nested reentrant": nested(reentrant, reentrant),
    "reentrant in the other": nested(not_reentrant, reentrant),
    "the other in reentrant": nested(reentrant, not_reentrant),
}


def gradients_of(model, run, step):
    """Of a step from a given seed, with all ks; and every parameter's gradient."""
    model.checkpointed = run
    model.zero_grad()
    torch.manual_seed(3)
    losses = step(model)
    ks = drawn(model)
    torch.rand(100)  # what the program draws between forward and backward
    for loss in losses:
        loss.backward()
    assert_close(drawn(model), ks)
    return losses, ks, [parameter.grad for parameter in model.parameters()]


def once(model):
    return [model(torch.randn(12, 5)).square().sum()]


def twice_of_one_size(model):
    return [model(torch.randn(12, 5)).square().sum() for _ in range(2)]


def in_the_other_order(model):
    return twice_of_one_size(model)[::-1]


def of_other_sizes(model):
    return [model(torch.randn(size, 5)).square().sum() for size in (12, 7)][::-1]


def added_up(model):
    return [sum(model(torch.randn(12, 5)).square().sum() for _ in range(3))]


def one_from_the_other(model):
    return [model(model(torch.randn(12, 5))[:, :5]).square().sum()]


ONE_SIZE = [once, twice_of_one_size, in_the_other_order, added_up, one_from_the_other]
STEPS = [*ONE_SIZE, of_other_sizes]
OFTEN = [(reentrant, in_the_other_order), (not_reentrant, in_the_other_order)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_computed_again_has_the_same_ks(way, step):
    model = Network()
    draw_together(model)
    assert_close(gradients_of(model, WAYS[way], step), gradients_of(model, None, step))


@pytest.mark.parametrize("inner", [None, reentrant, not_reentrant])
@BOTH
def test_a_checkpoint_around_the_whole_network(run, inner):
    model = Network(inner)
    draw_together(model)
    x = torch.randn(12, 5, requires_grad=True)
    results = []
    for whole in (run, lambda block, x: block(x)):
        model.zero_grad()
        torch.manual_seed(3)
        first, second = whole(model, x), whole(model, x * 2)
        torch.rand(100)
        second.square().sum().backward()
        first.square().sum().backward()
        results.append([first, second, *(p.grad for p in model.parameters())])
        model.checkpointed = None
    assert_close(*results)


@BOTH
def test_a_checkpoint_around_several_calls(run):
    model = nn.Sequential(Network(), Network())
    handle = draw_together(model)
    x = torch.randn(12, 5, requires_grad=True)

    def several(x):
        with handle.one_pass():
            return model[1](model[0](x)[:, :5])

    results = []
    for whole in (lambda f, x: run(f, x), lambda f, x: f(x)):
        model.zero_grad()
        torch.manual_seed(3)
        first, second = whole(several, x), whole(several, x * 2)
        first.sum().backward()
        second.sum().backward()
        results.append([first, second, drawn(model), *(p.grad for p in model.parameters())])
    assert_close(*results)


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer.forward(x)])
@BOTH
def test_a_checkpoint_around_a_layer_that_is_called_by_itself(run, call):
    model = nn.Sequential(TailDropout(), TailDropout())
    draw_together(model)
    x = torch.randn(12, 5, requires_grad=True)
    first, second = (run(lambda y: call(model[0], y) * y, x) for _ in range(2))
    for output in (first, second):
        (gradient,) = torch.autograd.grad(output.sum(), x) if run is not_reentrant else (None,)
        if gradient is None:
            x.grad = None
            output.sum().backward()
            gradient = x.grad
        assert_close(gradient, 2 * x * (output != 0))


def test_layers_whose_inputs_say_no_size_are_computed_again_too():
    class Late(Network):
        def forward(self, x):
            return super().forward(x[0][0])

    model = Late()
    draw_together(model)

    def step(model):
        return [model([[torch.randn(12, 5)]]).square().sum() for _ in range(2)]

    for run in (reentrant, not_reentrant):
        assert_close(gradients_of(model, run, step), gradients_of(model, None, step))


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_without_the_random_state_the_pass_is_unknown(use_reentrant, whole, forwards):
    def run(block, x):
        return checkpoint(block, x, use_reentrant=use_reentrant, preserve_rng_state=False)

    model = Network(None if whole else run)
    for block in model.blocks:
        block[1].p = 0.0
    draw_together(model)
    x = torch.randn(12, 5, requires_grad=True)
    outputs = [run(model, x) if whole else model(x) for _ in range(forwards)]
    with pytest.raises(RuntimeError, match=r"was not in it.*preserve_rng_state=True"):
        outputs[0].sum().backward()


@BOTH
def test_the_same_seed_for_batches_of_other_sizes(run):
    def step(model):
        losses = []
        for size in (12, 7):
            x = torch.randn(size, 5)
            torch.manual_seed(5)
            losses.append(model(x).square().sum())
        return losses

    model = Network()
    for block in model.blocks:
        block[1].p = 0.0
    draw_together(model)
    assert_close(gradients_of(model, run, step), gradients_of(model, None, step))


def test_after_an_error_in_backward_the_next_pass_is_a_new_one():
    model = Network()
    handle = draw_together(model)

    def fail(_):
        raise RuntimeError("stop")

    hook = model.stem.register_forward_hook(
        lambda _, __, output: output.register_hook(fail) and None
    )
    with pytest.raises(RuntimeError, match="stop"):
        model(torch.randn(12, 5)).sum().backward()
    hook.remove()
    model.blocks[0](torch.randn(7, 6))
    assert handle.drawn_u.shape == (7,)


def test_k_set_in_between_is_seen():
    """Where a checkpoint computes the layer again under another k."""
    for run in (reentrant, not_reentrant):
        for together in (False, True):
            model = Network(run)
            if together:
                draw_together(model)
            with at_width(model, 0.5):
                loss = model(torch.randn(12, 5, requires_grad=True)).sum()
            with pytest.raises(RuntimeError, match=r"got None after 0.5: put backward\(\) inside"):
                loss.backward()
            loss = model(torch.randn(12, 5, requires_grad=True)).sum()
            model.blocks[2][2].set_k(3)
            with pytest.raises(RuntimeError, match="got 3 after None"):
                loss.backward()


@pytest.mark.parametrize("k", [2, torch.arange(12) % 7])
def test_the_same_k_set_again_is_the_same(k):
    model = Network(not_reentrant)
    for layer in tail_dropouts(model).values():
        layer.set_k(k)
    model(torch.randn(12, 5)).sum().backward()
    loss = model(torch.randn(12, 5)).sum()
    for layer in tail_dropouts(model).values():
        layer.set_k(copy.deepcopy(k))
    loss.backward()
    with model.blocks[0][2].using_k(1):
        loss = model(torch.randn(12, 5)).sum()
    with pytest.raises(RuntimeError, match="after 1: put backward"):
        loss.backward()


def test_without_a_checkpoint_k_may_change_before_backward():
    model = Network()
    with at_width(model, 0.5):
        loss = model(torch.randn(12, 5)).sum()
    loss.backward()


def test_several_ks_in_one_checkpoint():
    layer = TailDropout()
    x = torch.ones(2, 6, requires_grad=True)

    def both(x):
        with layer.using_k(1):
            one = layer(x)
        with layer.using_k(4):
            return one * x + layer(x) * x

    not_reentrant(both, x).sum().backward()
    assert x.grad[0].tolist() == [4, 2, 2, 2, 0, 0]


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings(  # what torch does while it compiles
    "ignore:.*torch.jit.script_method.*:DeprecationWarning",
    "ignore:The .grad attribute:UserWarning",
)
class TestCompile:
    @pytest.mark.parametrize("backend", ["inductor"])
    def test_one_graph(self, backend):
        model = Reporting()
        handle = draw_together(model)
        fast = torch.compile(model, backend=backend, fullgraph=True)
        seen = set()
        for _ in range(3):
            ks = fast(torch.randn(40, 5))
            assert of_one_width(*ks, handle.drawn_u)
            for k, n, lengths in zip(ks, (8, 20, 7), WIDTHS, strict=True):
                assert_close(k, quantile(lengths, n, handle.drawn_u))
            seen.add(tuple(handle.drawn_u.tolist()))
        assert len(seen) == 3

    def test_nothing_recompiles(self):
        model = nn.Sequential(TailDropout(0.2), nn.ReLU(), TailDropout(0.2))
        draw_together(model)
        counter = CompileCounter()
        fast = torch.compile(model, backend=counter, fullgraph=True)
        x = torch.ones(40, 6)
        for p in (0.2, 0.5, 0.9, 0.0, 1.0):
            model[0].p = model[2].p = p
            fast(x)
        assert counter.frame_count == 1
        for width in (0.25, 0.5, 1.0):
            with at_width(fast, width):
                fast(x)
        assert counter.frame_count == 2
        fast(x)
        assert counter.frame_count == 2

    def test_a_dynamic_batch_compiles_once(self):
        model = nn.Sequential(TailDropout(0.2), nn.ReLU(), TailDropout(0.2))
        handle = draw_together(model)
        counter = CompileCounter()
        fast = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for size in (40, 20, 30):
            kept = fast(torch.ones(size, 9)).sum(1)
            assert_close(kept.to(int), quantile(Exponential(0.2), 9, handle.drawn_u))
        assert counter.frame_count == 1

    def test_a_model_that_is_compiled_already(self):
        model = nn.Sequential(TailDropout(), nn.ReLU(), TailDropout())
        fast = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.ones(40, 9)
        fast(x)
        handle = draw_together(fast, "[02]")
        assert list(handle.layers) == ["0", "2"]
        kept = fast(x).sum(1)
        assert_close(kept.to(int), quantile(Exponential(0.5), 9, handle.drawn_u))
        handle.remove()
        before = handle.drawn_u
        fast(x)
        assert handle.drawn_u is before or torch.equal(handle.drawn_u, before)

    @pytest.mark.parametrize(("backend", "together"), [("inductor", True), ("aot_eager", False)])
    def test_a_checkpoint_inside(self, backend, together):
        """Its gradients are those of the ks that its outputs show."""
        model = Chain()
        if together:
            draw_together(model)
        x = torch.randn(12, 5)
        model.run = not_reentrant
        outputs = torch.compile(model, backend=backend, fullgraph=True)(x)
        actual = torch.autograd.grad(outputs[-1].square().sum(), model.parameters())
        assert drawn(model) == [None, None]
        ks = [(output != 0).sum(1) for output in outputs]
        assert of_one_width(*ks) is together
        assert_close([outputs, actual], model.with_ks(ks, x))

    @pytest.mark.parametrize("backend", ["aot_eager"])
    def test_a_pass_around_a_compiled_checkpoint_of_the_whole(self, backend):
        model = Chain()
        handle = draw_together(model)
        fast = torch.compile(lambda x: not_reentrant(model, x), backend=backend, fullgraph=True)
        x = torch.randn(12, 5)
        with handle.one_pass(samples=12):
            outputs = fast(x)
        actual = torch.autograd.grad(outputs[-1].square().sum(), model.parameters())
        ks = [(output != 0).sum(1) for output in outputs]
        assert of_one_width(*ks, handle.drawn_u)
        assert_close([outputs, actual], model.with_ks(ks, x))

    @pytest.mark.parametrize(
        ("run", "step"),
        [
            pytest.param(run, step, marks=() if (run, step) in OFTEN else pytest.mark.long)
            for run in (reentrant, not_reentrant)
            for step in ONE_SIZE
        ],
    )
    def test_compiled_blocks_in_an_eager_checkpoint(self, run, step):
        model = Network()
        del model.blocks[2]
        draw_together(model)
        for block in model.blocks:
            block[1].p = 0.0
        expected = gradients_of(model, None, step)
        for block in model.blocks:
            block.compile(backend="eager")
        actual = gradients_of_compiled(model, run, step)
        assert_close(actual, (expected[0], expected[2]))

    @pytest.mark.slow
    @pytest.mark.parametrize("whole", [True, False])
    @BOTH
    def test_their_outputs_may_lie_deep_in_objects(self, run, whole):
        model = Returning(lambda x: Slotted(Plain({"x": [Plain(x)]})))
        draw_together(model)
        expected = gradients_of(model, None, twice_returned)
        model.compile_blocks(whole)
        actual = gradients_of_compiled(model, run, twice_returned)
        assert_close(actual, (expected[0], expected[2]))

    @pytest.mark.slow
    @pytest.mark.parametrize("whole", [True, False])
    @BOTH
    def test_outputs_that_are_not_found_are_an_error_and_no_draw_of_its_own(self, run, whole):
        model = Returning(lambda x: lambda: x)
        draw_together(model)
        model.compile_blocks(whole)
        model.checkpointed = run
        loss = returned(model(torch.randn(12, 5))).square().sum()
        with pytest.raises(RuntimeError, match=r"not found .* return the tensors themselves"):
            loss.backward()
        draw_together(model)
        hidden = returned(model(torch.randn(12, 5))).square().sum()
        model.return_as = Plain  # a pass that is found must not be taken for the hidden one
        found = returned(model(torch.randn(12, 5))).square().sum()
        with pytest.raises(RuntimeError, match=r"not found .* return the tensors themselves"):
            (hidden + found).backward()

    @pytest.mark.slow
    @BOTH
    def test_compiled_blocks_that_are_called_by_themselves_in_a_checkpoint(self, run):
        model = Returning(lambda x: lambda: x)
        draw_together(model)
        x = torch.randn(12, 6, requires_grad=True)
        shown = model.blocks[0][:3]
        shown.compile(backend="eager")
        output = run(shown, x)
        output.square().sum().backward()
        actual = shown[0].weight.grad
        shown[2].set_k((output != 0).sum(1))
        model.zero_grad()
        nn.Sequential.forward(shown, x).square().sum().backward()
        assert_close(actual, shown[0].weight.grad)

    def test_after_backward_a_compiled_block_has_passes_of_its_own(self):
        model = Network()
        handle = draw_together(model)
        model.blocks[0].compile(backend="eager")
        model(torch.randn(12, 5)).sum().backward()
        before = handle.drawn_u
        model.blocks[0](torch.randn(12, 6))
        assert not torch.equal(handle.drawn_u, before)

    @BOTH
    def test_compiled_blocks_with_a_graph_break(self, run):
        class Breaking(nn.Sequential):
            def forward(self, x):
                x = self[0](x)
                torch._dynamo.graph_break()
                return self[3](self[2](x))

        model = Network()
        del model.blocks[2]
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Breaking(*block)
        draw_together(model)
        expected = gradients_of(model, None, in_the_other_order)
        for block in model.blocks:
            block.compile(backend="eager")
        actual = gradients_of_compiled(model, run, in_the_other_order)
        assert_close(actual, (expected[0], expected[2]))

    @BOTH
    def test_a_compiled_network_in_an_eager_checkpoint(self, run):
        model = Chain()
        draw_together(model)
        fast = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.randn(12, 5, requires_grad=True)
        first, second = run(fast, x), run(fast, x * 2)
        for outputs, scale in ((first, 1), (second, 2)):
            model.zero_grad()
            outputs[-1].square().sum().backward()
            actual = [parameter.grad.clone() for parameter in model.parameters()]
            ks = [(output != 0).sum(1) for output in outputs]
            assert of_one_width(*ks)
            assert_close([outputs, tuple(actual)], copy.deepcopy(model).with_ks(ks, x * scale))


class Plain:
    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def returned(value):
    """The tensor in what a model returns."""
    while not isinstance(value, torch.Tensor):
        if isinstance(value, Plain | Slotted):
            value = value.value
        else:
            value = value() if callable(value) else next(iter(value["x"]))
    return value


def twice_returned(model):
    return [returned(model(torch.randn(12, 5))).square().sum() for _ in range(2)]


class Returning(Network):
    """A network that returns its output in something, and has no other dropout."""

    def __init__(self, return_as):
        super().__init__()
        self.return_as = return_as
        del self.blocks[2]
        for block in self.blocks:
            block[1].p = 0.0

    def forward(self, x):
        return self.return_as(super().forward(x))

    def compile_blocks(self, whole):
        """The blocks as a whole, or only the layers in them."""
        for block in self.blocks:
            (block if whole else block[2]).compile(backend="eager")


class Chain(nn.Module):
    """Two blocks, whose outputs show their ks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(n, 9), TailDropout(lengths=lengths))
            for n, lengths in ((5, Uniform()), (9, Exponential(0.2)))
        )
        self.run = lambda block, x: block(x)

    def forward(self, x):
        first = self.run(self.blocks[0], x)
        return first, self.run(self.blocks[1], first)

    def with_ks(self, ks, x):
        """Its outputs and gradients with these ks set, without a checkpoint."""
        self.run = lambda block, x: block(x)
        for block, k in zip(self.blocks, ks, strict=True):
            block[1].set_k(k)
        outputs = self(x)
        return [outputs, torch.autograd.grad(outputs[-1].square().sum(), self.parameters())]


class Reporting(nn.Module):
    """Returns the k of each of several layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(TailDropout(lengths=lengths) for lengths in WIDTHS)

    def forward(self, x):
        return [
            layer(x.new_ones(len(x), n)).sum(1).to(torch.int64)
            for n, layer in zip((8, 20, 7), self.layers, strict=True)
        ]


def gradients_of_compiled(model, run, step):
    """As `gradients_of`, where the layers don't keep what they drew."""
    model.checkpointed = run
    model.zero_grad()
    torch.manual_seed(3)
    losses = step(model)
    torch.rand(100)
    for loss in losses:
        loss.backward()
    return losses, [parameter.grad for parameter in model.parameters()]


# --- copies, and what else is done to a model ---------------------------------------------------


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, unpickled])
def test_a_copy_is_drawn_together_by_itself(duplicate):
    model = Network()
    handle = draw_together(model)
    model(torch.randn(50, 5))
    before = handle.drawn_u
    twin = duplicate(model)
    twin(torch.randn(30, 5))
    assert of_one_width(*drawn(twin))
    assert drawn(twin)[0].shape == (30,)
    assert_close(handle.drawn_u, before)
    torch.manual_seed(1)
    model(torch.randn(30, 5))
    torch.manual_seed(1)
    twin(torch.randn(30, 5))
    assert_close(drawn(twin), drawn(model))
    again = draw_together(twin)
    twin(torch.randn(30, 5))
    assert of_one_width(*drawn(twin), again.drawn_u)
    again.remove()
    twin(torch.randn(50, 5))
    assert not of_one_width(*drawn(twin))


def test_a_copy_in_the_middle_of_a_pass():
    model = Network()
    handle = draw_together(model)
    with handle.one_pass():
        model(torch.randn(50, 5))
        twin = copy.deepcopy(model)
    for _ in range(2):
        twin(torch.randn(30, 5))
        assert of_one_width(*drawn(twin))


def test_hooks_of_a_new_process_do_not_take_the_place_of_those_in_a_file(monkeypatch):
    model = Network()
    draw_together(model)
    file = pickle.dumps(model)
    first = min(*model._forward_hooks, *model._forward_pre_hooks)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", first)
    twin = pickle.loads(file)
    for _ in range(3):
        twin.register_forward_pre_hook(lambda *_: None)
        twin.register_forward_hook(lambda *_: None)
    twin(torch.randn(50, 5))
    assert of_one_width(*drawn(twin))


def test_an_average_of_the_weights():
    model = Network()
    draw_together(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    average.train()(torch.randn(50, 5))
    assert of_one_width(*drawn(average))


def test_torch_func():
    model = Network()
    handle = draw_together(model)
    x = torch.randn(12, 5)
    parameters = dict(model.named_parameters())
    torch.manual_seed(3)
    model(x).square().sum().backward()
    torch.manual_seed(3)
    gradients = torch.func.grad(lambda p: functional_call(model, p, (x,)).square().sum())(
        parameters
    )
    assert_close(gradients, {name: p.grad for name, p in model.named_parameters()})
    assert of_one_width(handle.drawn_u, *drawn(model))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_an_ensemble_under_vmap(randomness):
    models = [nn.Sequential(nn.Linear(4, 6), TailDropout(), nn.Linear(6, 6), TailDropout())] * 3
    draw_together(models[0])
    for module in models[0]:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 1.0)
            nn.init.constant_(module.bias, 1.0)
    parameters, buffers = stack_module_state(models)

    def run(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,))

    x = torch.ones(40, 4)
    output = torch.vmap(run, in_dims=(0, 0, None), randomness=randomness)(parameters, buffers, x)
    k = (output != 0).sum(2)  # of the second layer; what remains shows that of the first
    first = (output.amax(2) - 1) / 5
    for member in range(3):
        seen = k[member] > 0
        assert of_one_width(k[member][seen], first[member][seen].round())
    assert torch.equal(k[0], k[1]) is (randomness == "same")


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("fake", [True, False])
def test_without_values(fake, recording):
    with FakeTensorMode() if fake else torch.device("meta"), torch.set_grad_enabled(recording):
        model = nn.Sequential(nn.Linear(5, 6), TailDropout(), nn.Linear(6, 7), TailDropout())
        handle = draw_together(model)
        assert model(torch.ones(3, 5)).shape == (3, 7)
        assert handle.drawn_u.shape == model[3].drawn_k.shape == (3,)


def test_layers_that_are_inserted():
    model = nn.Sequential(nn.Linear(5, 6), nn.GRU(6, 8, batch_first=True), nn.Identity())
    td.insert(model, "0", TailDropout(lengths=Uniform()))
    td.insert(model, "1", TailDropout(lengths=Uniform()), at="input")
    td.insert(model, "", TailDropout(lengths=Uniform()))
    handle = draw_together(model)
    assert list(handle.layers) == ["0.tail_dropout", "1.tail_dropout", "tail_dropout"]

    model[2].forward = lambda x: x[0]
    model(torch.randn(50, 3, 5))
    assert of_one_width(*drawn(model), handle.drawn_u)
    td.remove(model, "1")
    model(torch.randn(20, 3, 5))
    assert of_one_width(*drawn(model), handle.drawn_u)


def test_a_pruned_network_is_still_drawn_together():
    model = nn.Sequential(
        nn.Linear(5, 8), TailDropout(), nn.ReLU(), nn.Linear(8, 9), TailDropout(), nn.LayerNorm(9)
    )
    draw_together(model)
    model.eval()
    small = td.prune(model, 0.5, torch.randn(3, 5)).train()
    assert any(type(layer) is not TailDropout for layer in tail_dropouts(small).values())
    for _ in range(2):
        small(torch.randn(50, 5))
        assert of_one_width(*drawn(small))
    state = torch.get_rng_state()
    small.eval()(torch.randn(0, 5))
    assert torch.equal(state, torch.get_rng_state())
    plain = td.finalize(td.prune(model, {"1": 0.5}, torch.randn(3, 5)))
    for module in plain.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_sizes_are_those_of_each_layer():
    lengths = Sizes([0.25, 0.5, 1.0])
    model = nn.Sequential(*[TailDropout(lengths=lengths) for _ in range(2)])
    draw_together(model)
    ks = (model[:1](torch.ones(30, 4)), model[1:](torch.ones(30, 8)))
    assert {len(k) for k in ks} == {30}
    model(torch.ones(30, 8))
    assert set(model[0].drawn_k.tolist()) == {2, 4, 8}
    assert_close(model[0].drawn_k, model[1].drawn_k)
