"""The measures of benchmarks/evidence, against independent oracles."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import (
    convnet,
    gpt,
    hermite,
    language,
    linear,
    pca,
    regression,
    retrieval,
    wordnet,
)
from benchmarks.evidence.report import Settings, count_flops
from taildropout import TailDropout, nest, prune
from taildropout.demo.data import DataError
from taildropout.lengths import Uniform

pytestmark = pytest.mark.slow


def centred(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return values - values.mean(0)


def test_with_targets_equal_to_inputs_the_optimum_is_pca():
    data = centred(200, 6) * torch.arange(1, 7)
    optimum = linear.Optimum(linear.Pairs(data, data))
    pca = PCA(4).fit(data.numpy())
    axes = torch.tensor(pca.components_)
    assert max(optimum.excess(axes, axes.T), key=abs) == pytest.approx(0, abs=1e-10)
    assert optimum.axis_error(axes.T) == pytest.approx(0, abs=1e-10)
    assert optimum.axis_error(axes.flip(0).T) == pytest.approx(1, abs=1e-10)


def test_with_uncorrelated_inputs_the_optimum_is_the_truncated_svd():
    """Eckart and Young: |Y - XW|^2 = |W - X'Y|^2 + a constant, if X'X is the identity."""
    inputs, targets = torch.linalg.qr(centred(200, 5)).Q, centred(200, 4, seed=1)
    optimum = linear.Optimum(linear.Pairs(inputs, targets))
    left, values, right = torch.linalg.svd(inputs.T @ targets, full_matrices=False)
    encoder, decoder = left.T, (values[:, None] * right).T
    assert max(optimum.distances(encoder, decoder)) < 1e-10
    torch.testing.assert_close(
        torch.tensor(optimum.excess(encoder, decoder)), torch.zeros(4), rtol=0, atol=1e-10
    )


def test_controls_of_a_linear_network_are_random_features_and_pca_of_its_codes():
    data = centred(200, 6) * torch.arange(1, 7)
    pairs = linear.Pairs(data, data)
    encoder, decoder = centred(4, 6, seed=1), centred(6, 4, seed=2)
    codes = data @ encoder.T
    best = torch.tensor(linear.Optimum(pairs).errors)
    expected = []
    for k in range(1, 5):
        reduced = PCA(k).fit(codes.numpy())
        kept = torch.tensor(reduced.inverse_transform(reduced.transform(codes.numpy())))
        expected.append((data - kept @ decoder.T).square().sum())
    expected = torch.stack(expected) / best[:4] - 1
    for optimum in (linear.Optimum(pairs), linear.Optimum(pairs.condensed)):
        first, random, principal = (
            torch.tensor(optimum.excess(encoder, decoder, features))
            for features in ("first", "random", "principal")
        )
        torch.testing.assert_close(principal, expected.float())
        torch.testing.assert_close(random[-1], first[-1])
        assert (random[:-1] != first[:-1]).any()


def test_the_tables_of_linear_networks_print_their_controls(monkeypatch):
    monkeypatch.setattr(regression, "steps", lambda settings: 2)
    monkeypatch.setattr(pca, "data_sets", lambda settings: {pca.DIGITS: 2})
    control = {linear.NO_DROPOUT: linear.methods(4, [], [])[linear.NO_DROPOUT]}
    for module in (pca, regression):
        monkeypatch.setattr(module, "methods", lambda *args: control)
        text = module.text(module.measure(Settings(quick=True), [0]), Settings(quick=True))
        head = next(line for line in text.splitlines() if line.startswith("| k from"))
        assert "random features | " in head
        assert head.endswith("principal components |")


def test_condensed_pairs_have_the_same_second_moments_in_fewer_rows():
    pairs = linear.Pairs(centred(200, 5), centred(200, 3, seed=1))
    few = pairs.condensed
    assert len(few.inputs) == 8
    for one, other in [("inputs", "inputs"), ("inputs", "targets"), ("targets", "targets")]:
        expected = getattr(pairs, one).T @ getattr(pairs, other) / 200
        actual = getattr(few, one).T @ getattr(few, other) / 8
        torch.testing.assert_close(actual, expected)


class Hermite(nn.Module):
    """He_2, He_1, He_3, ... by numpy: the first two in the wrong order."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        order = [2, 1, *range(3, hermite.WIDTH + 1)]
        values = [np.polynomial.hermite_e.HermiteE.basis(j)(input[:, 0].numpy()) for j in order]
        return torch.tensor(np.stack(values, 1))


def test_correlations_with_hermite_know_the_hermite_polynomials():
    correlations = torch.tensor(hermite.correlations_with_hermite(Hermite()))
    expected = torch.tensor([0.0, 0.0] + [1.0] * (hermite.WIDTH - 2))
    torch.testing.assert_close(correlations, expected, rtol=0, atol=1e-5)


def test_the_exact_loss_is_the_mean_of_the_sampled_one_over_all_k():
    torch.manual_seed(0)
    f, g = torch.randn(2, 50, hermite.WIDTH)
    layer = TailDropout(batch_dim=())
    losses = []
    for k in range(1, hermite.WIDTH + 1):
        with layer.using_k(k):
            losses.append(hermite.sampled_loss(layer)(f, g))
    torch.testing.assert_close(hermite.expected_loss(Uniform())(f, g), torch.stack(losses).mean())


def test_rotated_features_are_canonical_variables():
    """Of mixtures of He_1 and He_2 alone, the rotation finds the two, in order."""

    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x + x**2, x - 0.5 * x**2], 1)

    torch.manual_seed(0)
    f, g = hermite.rotated(Mixed(), Mixed(), rho=-0.6)
    for network in (f, g):
        first, second = hermite.correlations_with_hermite(network, count=2)
        assert first > 0.999
        assert second > 0.999


def test_a_section_replaces_its_last_version_and_the_others_stay_in_their_order(tmp_path):
    page = tmp_path / "page.md"
    for name, text in [("regression", "old"), ("pca", "axes"), ("regression", "new")]:
        command.write_section(page, name, f"## {command.TABLES[name].TITLE}\n\n{text}\n")
    text = page.read_text()
    assert text.startswith("# Evidence")
    assert "old" not in text
    assert 0 < text.index("axes") < text.index("new")
    assert text.count("\n## ") == 2


def test_numbers_that_were_written_give_the_same_section_when_read(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    command.main(["--quick", "--only", "hermite", "--rho", "-0.6", "--json", str(file)])
    measured = capsys.readouterr().out
    assert "\npython -m benchmarks.evidence --only hermite --rho -0.6 --quick\n" in measured
    command.main(["--read", str(file)])
    assert capsys.readouterr().out == measured


def test_flops_of_a_step_are_two_for_each_multiplication_of_its_three_products():
    """Forward, and the gradients of weights and inputs; the first layer's inputs need none."""
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    flops = count_flops(lambda: model(torch.randn(11, 5)).sum().backward())
    assert flops == 2 * 11 * (2 * 5 * 7 + 3 * 7 * 3)


@pytest.mark.parametrize("build", [convnet.residual, convnet.perceptron])
def test_the_networks_of_each_width_have_the_shapes_that_prune_gives(build):
    model, images = build(1.0), torch.rand(2, 784)
    nest(model, images, lengths=convnet.RECIPE, min_width=1 / 8, streams=True)
    for width in convnet.WIDTHS[:-1]:
        small = prune(model, width, images).state_dict()
        own = build(width).state_dict()
        assert {name: value.shape for name, value in small.items()} == {
            name: value.shape for name, value in own.items()
        }


ENTRIES = """\
  1 This software and database is being provided
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | what exists
00001930 18 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 003 @ 00001740 n 0000 @i 00000009 n 0000 + 1 v 0102 | ten words; "a | b"
"""


def test_glosses_and_hypernyms_are_read_as_the_format_says(tmp_path):
    """With ten words, 0a in hex, a licence, and a pointer to a hypernym of an instance, `@i`."""
    for name in wordnet.PARTS.values():
        (tmp_path / f"data.{name}").write_text(ENTRIES if name == "noun" else "")
    assert wordnet.synsets(tmp_path) == {
        "n00001740": wordnet.Synset("what exists", ()),
        "n00001930": wordnet.Synset('ten words; "a | b"', ("n00001740",)),
    }


def test_missing_glosses_name_the_package(tmp_path):
    with pytest.raises(DataError, match=r"data\.noun is missing.*apt-get install wordnet-base"):
        wordnet.synsets(tmp_path)


with_wordnet = pytest.mark.skipif(
    not wordnet.FOLDER.is_dir(), reason="WordNet is not here: apt-get install wordnet-base"
)


@with_wordnet
def test_there_are_as_many_synsets_as_wordnet_says():
    """wnstats(7WN) of WordNet 3.0."""
    parts = [key[0] for key in wordnet.synsets()]
    assert {part: parts.count(part) for part in "nvar"} == {
        "n": 82115,
        "v": 13767,
        "a": 18156,
        "r": 3621,
    }


@pytest.mark.parametrize("width", language.WIDTHS)
def test_a_network_for_a_width_has_the_shape_of_the_pruned_one(width):
    model = gpt.GPT()
    nest(model, language.EXAMPLE)
    pruned = prune(model, width, language.EXAMPLE)
    shapes = {name: value.shape for name, value in gpt.GPT(width).state_dict().items()}
    assert {name: value.shape for name, value in pruned.state_dict().items()} == shapes


def test_a_gpt_does_not_see_what_comes():
    torch.manual_seed(0)
    model, text = gpt.GPT(), torch.randint(gpt.SYMBOLS, (2, gpt.CONTEXT))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    changed = text.clone()
    changed[:, 10:] = 0
    now, then = model(text), model(changed)
    torch.testing.assert_close(now[:, :10], then[:, :10])
    assert (now[:, 10] != then[:, 10]).any()


def test_flops_of_a_linear_layer_are_two_for_each_product_of_each_of_three_matrices():
    layer, x = nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_some_bags_have_the_words_of_their_texts():
    bags = retrieval.Bags(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 2, 2, 3]))  # 56, none, 7, 8
    some = bags.of(torch.tensor([3, 0, 1, 0]))
    assert some.words.tolist() == [8, 5, 6, 5, 6]
    assert some.starts.tolist() == [0, 1, 3, 3]


def test_the_same_answer_of_another_pair_counts_as_no_other():
    queries, answers = torch.randn(2, 3, 4)
    answers[2] = answers[0]
    alike = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()
    loss = retrieval.contrastive(queries, answers, alike)
    logits = retrieval.SCALE * queries @ answers.T
    others = [
        ([0, 1], 0),
        ([0, 1, 2], 1),
        ([1, 2], 1),
    ]  # the columns of each query, and which is right
    expected = [
        nn.functional.cross_entropy(row[columns], torch.tensor(right))
        for row, (columns, right) in zip(logits, others, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_recall_is_that_of_sorted_cosines(monkeypatch):
    torch.manual_seed(0)
    queries, answers = torch.randn(30, 6), torch.randn(200, 6)

    class Known:
        def queries(self, numbers):
            return queries[numbers]

        def answers(self, numbers):
            return answers

    class All:
        def of(self, numbers):
            return numbers

    pairs = retrieval.Pairs(torch.arange(30), torch.randint(200, (30,)))
    data = retrieval.Data(All(), None, pairs, pairs, pairs)
    monkeypatch.setattr(retrieval, "glosses", lambda: data)
    for k in (2, 6):
        cosines = nn.functional.cosine_similarity(queries[:, None, :k], answers[None, :, :k], dim=2)
        nearest = cosines.argsort(1, descending=True)[:, : retrieval.FOUND]
        found = [pairs.hypernyms[i] in nearest[i] for i in range(30)]
        assert retrieval.recalls(Known(), pairs, [k]) == [pytest.approx(100 * np.mean(found))]
        assert 0 < sum(found) < 30


@with_wordnet
@pytest.mark.parametrize("table", [language, retrieval])
def test_the_tables_of_glosses_print_their_controls(table):
    text = table.text(table.measure(Settings(quick=True), [0]), Settings(quick=True))
    rows = [line for line in text.splitlines() if line.startswith("| control: ")]
    assert any("random features" in row for row in rows)
    assert any("principal components" in row for row in rows)
    assert table.DEDICATED in text
