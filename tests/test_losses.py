"""PrefixLoss against a loop over k."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import (
    cosine_similarity,
    cross_entropy,
    mse_loss,
    normalize,
    triplet_margin_loss,
)
from torch.testing import assert_close

from taildropout import PrefixLoss
from taildropout.lengths import Exponential, Full, LogUniform, Mixed, Sizes, Uniform

N, BATCH = 8, 5


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def in_batch(anchors, positives, temperature=0.5):
    """Of all positives in the batch, the own one: the loss of contrastive training."""
    scores = normalize(anchors, dim=-1) @ normalize(positives, dim=-1).T / temperature
    return cross_entropy(scores, torch.arange(len(scores)))


def ranking(query, documents):
    """The first document is to be the closest."""
    scores = torch.einsum("bn,bdn->bd", query, documents)
    return (1 - scores[:, :1] + scores[:, 1:]).relu().sum()


def pairs(a, b):
    """One value for each pair."""
    return 1 - cosine_similarity(a, b)


LOSSES = {
    "contrastive": (in_batch, [(BATCH, N), (BATCH, N)]),
    "triplets": (triplet_margin_loss, [(BATCH, N)] * 3),
    "triplets, a module": (nn.TripletMarginLoss(margin=2), [(BATCH, N)] * 3),
    "ranking": (ranking, [(BATCH, N), (BATCH, 4, N)]),
    "a loss for each pair": (pairs, [(BATCH, N), (BATCH, N)]),
    "mean over features": (mse_loss, [(BATCH, N), (BATCH, N)]),
}


# --- the value --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("lengths", "draws", "ks"),
    [
        (Sizes([3]), 4, [N, 3, 3, 3]),
        (Sizes([2, 5]), 3, [N, 2, 5]),  # stratified: one of each
        (Sizes([0.25, 1.0]), 5, [N, N, N, 2, 2]),
        (Full(), 2, [N, N]),
        (Uniform(), N + 1, [N, *range(1, N + 1)]),
    ],
    ids=repr,
)
def test_it_is_the_mean_over_the_drawn_ks_and_full_width(name, lengths, draws, ks):
    loss, shapes = LOSSES[name]
    embeddings = [double(*shape) for shape in shapes]
    actual = PrefixLoss(loss, lengths, draws)(*embeddings)
    expected = torch.stack([loss(*(e[..., :k] for e in embeddings)) for k in ks]).mean(0)
    assert_close(actual, expected)
    gradients = [torch.autograd.grad(value.sum(), embeddings) for value in (actual, expected)]
    assert_close(*gradients)


def drawn_by(loss, embeddings, calls=1):
    """All ks, n included, counted by what each call returns: 1/draws at each of its ks."""

    def counts(*embeddings):
        ks = {embedding.shape[loss.dim] for embedding in embeddings}
        assert len(ks) == 1  # all embeddings are cut alike
        return nn.functional.one_hot(torch.tensor(ks.pop()), N + 1).double()

    loss.loss = counts
    found = []
    for _ in range(calls):
        share = loss(*embeddings) * loss.draws
        assert_close(share, share.round())
        found.append(share.round().long())
    return torch.stack(found)


@pytest.mark.parametrize(
    "lengths",
    [LogUniform(), Uniform(), Exponential(0.7), Sizes([2, 5], [1, 3]), Mixed([Full(), Uniform()])],
    ids=repr,
)
def test_ks_follow_the_lengths_and_n_is_among_them(lengths, assert_drawn_from):
    """Of an `Exponential`, which draws 0 too, the other ks keep their proportions."""
    loss = PrefixLoss(in_batch, lengths, draws=4)
    counts = drawn_by(loss, torch.randn(2, BATCH, N), calls=400)
    assert_close(counts.sum(1), torch.full((400,), 4))
    counts[:, N] -= 1
    assert (counts >= 0).all()
    pmf = lengths.pmf(N)
    pmf[0] = 0
    k = torch.arange(N + 1).repeat_interleave(counts.sum(0))
    assert_drawn_from(k, pmf / pmf.sum())


def test_its_expectation_is_the_objective_with_full_width_in_each_call():
    """`Mixed([Full(), lengths], [1, draws - 1])`, as the documentation says."""
    pmf = Mixed([Full(), Uniform()], [1, 3]).pmf(N)
    a, b = torch.randn(2, BATCH, N, dtype=torch.float64)
    exact = sum(pmf[k] * in_batch(a[:, :k], b[:, :k]) for k in range(1, N + 1))
    loss = PrefixLoss(in_batch, Uniform(), draws=4)
    values = torch.stack([loss(a, b) for _ in range(400)])
    error = (values.mean() - exact).abs()
    assert error < 5 * values.std() / 400**0.5
    assert values.std() > 0


def test_the_draws_of_a_call_are_spread_over_the_distribution():
    """Of seven draws from 1, ..., 7 each comes once."""
    counts = drawn_by(PrefixLoss(in_batch, Sizes(range(1, N)), N), torch.randn(2, BATCH, N), 20)
    assert_close(counts, torch.tensor([0, *[1] * N]).expand(20, -1))


def test_a_k_that_comes_several_times_costs_once():
    calls = []

    def loss(a, b):
        calls.append(a.shape[-1])
        return in_batch(a, b)

    PrefixLoss(loss, Sizes([3]), 6)(*torch.randn(2, BATCH, N))
    assert sorted(calls) == [3, N]


@pytest.mark.parametrize("shape", [(BATCH, N), (N, BATCH)])
def test_normalized_prefixes_have_length_1(shape):
    dim = shape.index(N)
    embeddings = [double(*shape) for _ in range(2)]

    def products(a, b):
        return (a * b).sum(dim)

    actual = PrefixLoss(products, Sizes([3]), 2, normalize=True, dim=dim)(*embeddings)
    cut = [[e.narrow(dim, 0, k) for e in embeddings] for k in (3, N)]
    assert_close(actual, sum(cosine_similarity(*pair, dim=dim) for pair in cut) / 2)


def test_in_eval_it_is_the_loss():
    a, b = torch.randn(2, BATCH, N)
    loss = PrefixLoss(in_batch, Sizes([3])).eval()
    state = torch.get_rng_state()
    assert_close(loss(a, b), in_batch(a, b), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    normalized = PrefixLoss(lambda a, b: (a * b).sum(1), normalize=True).eval()
    assert_close(normalized(a, b), cosine_similarity(a, b))


def test_gradients():
    def call(*embeddings):
        generator = torch.Generator().manual_seed(3)
        return PrefixLoss(in_batch, draws=4, generator=generator)(*embeddings)

    embeddings = [double(3, 6), double(3, 6)]
    assert torch.autograd.gradcheck(call, embeddings)
    assert torch.autograd.gradgradcheck(call, embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    a, b = torch.randn(2, BATCH, N).to(dtype)
    actual = PrefixLoss(in_batch, Sizes([2, 5]), 3)(a, b)
    assert actual.dtype == dtype
    expected = sum(in_batch(a[:, :k].double(), b[:, :k].double()) for k in (2, 5, N)) / 3
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast():
    encoder = nn.Linear(3, N)
    x, y = torch.randn(2, BATCH, 3)
    loss = PrefixLoss(in_batch, Sizes([3]), 2)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = encoder(x), encoder(y)
        actual = loss(a, b)
        expected = (in_batch(a[:, :3], b[:, :3]) + in_batch(a, b)) / 2
    assert a.dtype == torch.bfloat16
    assert_close(actual, expected, rtol=0, atol=0)
    actual.backward()
    assert encoder.weight.grad.isfinite().all()


# --- what is cut -------------------------------------------------------------------------------


def shapes_of(*args, **kwargs):
    """What a loss gets at k = 3, and in eval."""
    seen = []

    def loss(*args, **kwargs):
        seen.append(
            torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.shape, [args, kwargs])
        )
        return torch.zeros(())

    def call(**options):
        PrefixLoss(loss, Sizes([3]), 2, **options)(*args, **kwargs)
        return seen[-1]

    return call


def test_all_that_has_as_many_features_is_cut_and_nothing_else():
    a, documents, labels = torch.randn(BATCH, N), torch.randn(BATCH, 4, N), torch.arange(BATCH)
    weights, ids, other = torch.rand(N), torch.ones(BATCH, N).long(), torch.randn(BATCH, N + 1)
    call = shapes_of(a, [documents, labels], weights, other, more={"b": a, "ids": ids, "p": 0.1})
    args, kwargs = call()
    assert args == (
        *((BATCH, 3), [(BATCH, 4, 3), (BATCH,)], (N,)),  # weights are for samples, maybe
        (BATCH, N + 1),
    )
    assert kwargs == {"more": {"b": (BATCH, 3), "ids": (BATCH, N), "p": 0.1}}


def test_those_that_are_named_are_cut():
    a, scores = torch.randn(N, N), torch.randn(N, N)
    args, kwargs = shapes_of(a, scores, b=a)(embeddings=[0, "b"])
    assert args == ((N, 3), (N, N))
    assert kwargs == {"b": (N, 3)}


def test_what_is_given_twice_is_cut_where_it_is_an_embedding():
    a = torch.randn(BATCH, N)
    args, _ = shapes_of(a, a)(embeddings=[0])
    assert args == ((BATCH, 3), (BATCH, N))


def test_features_may_lie_along_another_dim():
    args, _ = shapes_of(torch.randn(2, N, 4), torch.randn(3, N))(dim=1)
    assert args == ((2, 3, 4), (3, 3))


def test_single_embeddings():
    args, _ = shapes_of(torch.randn(N), torch.randn(N), torch.randn(BATCH, N))()
    assert args == ((3,), (3,), (BATCH, 3))


# --- as a module ---------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)

    def forward(self, a, b):
        return in_batch(self.dropout(a), b, self.temperature)


def test_what_the_loss_learns_is_its_own():
    loss = PrefixLoss(Own(), Sizes([3]), 2)
    assert [name for name, _ in loss.named_parameters()] == ["loss.temperature"]
    loss(*torch.randn(2, BATCH, N)).backward()
    assert loss.loss.temperature.grad.abs() > 0
    assert not loss.eval().loss.training


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(make):
    loss, embeddings = (
        PrefixLoss(in_batch, Uniform(2), 3, normalize=True, dim=1),
        torch.randn(2, 9, N),
    )
    values = []
    for module in (loss, make(loss)):
        torch.manual_seed(1)
        values.append(module(*embeddings))
    assert_close(*values, rtol=0, atol=0)
    assert repr(make(loss)) == repr(loss)


def test_it_says_what_it_is():
    loss = PrefixLoss(nn.TripletMarginLoss(), draws=3, normalize=True, dim=1, embeddings=["a"])
    assert "lengths=LogUniform(min_k=1), draws=3, normalize=True, dim=1, embeddings=('a',)" in repr(
        loss
    )
    assert "lengths=LogUniform(min_k=1), draws=6\n" in repr(PrefixLoss(nn.TripletMarginLoss()))


def test_draws_come_from_the_generator():
    a, b = torch.randn(2, BATCH, N)
    values = []
    for seed in (5, 5, 6):
        loss = PrefixLoss(in_batch, draws=4, generator=torch.Generator().manual_seed(seed))
        state = torch.get_rng_state()
        values.append(torch.stack([loss(a, b) for _ in range(3)]))
        assert torch.equal(torch.get_rng_state(), state)
    assert_close(values[0], values[1], rtol=0, atol=0)
    assert not torch.equal(values[0], values[2])


# The compiler looks at the gradient of what it is given, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    def check(self, step, compiled, embeddings):
        for seed in range(8):
            values = []
            for function in (compiled, step):
                torch.manual_seed(seed)
                values.append(function(*embeddings))
            assert_close(*values)
            assert_close(*[torch.autograd.grad(value, embeddings) for value in values])

    def test_code_around_it_is_compiled_once(self):
        loss, counter, embeddings = (
            PrefixLoss(in_batch),
            CompileCounter(),
            (double(9, 40), double(9, 40)),
        )

        def step(a, b):
            return loss(a.sin(), b.cos()) * 2

        self.check(step, torch.compile(step, backend=counter), embeddings)
        assert counter.frame_count == 2  # in front of it, and behind

    def test_a_compiled_loss_is_not_compiled_for_each_k(self):
        counter, embeddings = CompileCounter(), (double(9, 40), double(9, 40))
        loss = PrefixLoss(in_batch, lengths=Uniform(2))
        compiled = PrefixLoss(torch.compile(in_batch, backend=counter, dynamic=True), Uniform(2))
        self.check(loss, compiled, embeddings)
        assert counter.frame_count == 2  # whole embeddings are contiguous, prefixes are not

    def test_in_eval_it_is_one_graph(self):
        loss, counter = PrefixLoss(in_batch, normalize=True).eval(), CompileCounter()
        a, b = torch.randn(2, 9, 40)
        compiled = torch.compile(loss, fullgraph=True, backend=counter)
        assert_close(compiled(a, b), loss(a, b))
        assert counter.frame_count == 1


# --- errors --------------------------------------------------------------------------------------


A = torch.ones(BATCH, N)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PrefixLoss("triplet"), TypeError, "loss must be a function or module.*'triplet'"),
        (
            lambda: PrefixLoss(in_batch, draws=1),
            ValueError,
            "draws must be an int, at least 2.*got 1",
        ),
        (lambda: PrefixLoss(in_batch, draws=2.5), ValueError, r"draws must be an int.*got 2\.5"),
        (lambda: PrefixLoss(in_batch, [2, 4]), TypeError, "pmf"),
        (lambda: PrefixLoss(in_batch)(), ValueError, "must be embeddings.*got arguments \\[\\]"),
        (lambda: PrefixLoss(in_batch)(A.long()), ValueError, "must be embeddings"),
        (lambda: PrefixLoss(in_batch, embeddings=[0, "b"])(A), ValueError, "'b'"),
        (lambda: PrefixLoss(in_batch, embeddings=[0, 1])(A, A[:, 1:]), ValueError, "one number of"),
        (lambda: PrefixLoss(in_batch, Exponential(1.0))(A, A), ValueError, "some k above 0"),
        (
            lambda: PrefixLoss(lambda a: (a.sum(), a))(A),
            TypeError,
            "must return a tensor, got tuple",
        ),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
