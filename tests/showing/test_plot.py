import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import taildropout as td
from taildropout.showing.plot import (
    DROPPED,
    KEPT,
    plot_calibration,
    plot_keep_probability,
    plot_lengths,
    plot_mask,
    plot_predictions,
    plot_scree,
)

SCREE = td.Scree(
    "1",
    [0, 1, 3],
    torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64),
    count=100,
    cov=torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)),
)


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_curve_is_the_loss_against_k():
    fig, ax = plot_scree(SCREE)
    assert isinstance(fig, Figure)
    assert ax.figure is fig
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[0, 4], [1, 2], [3, 1]]
    assert ax.get_xlabel() == "k, features kept"
    assert ax.get_legend() is None


def test_the_band_is_one_standard_error_to_either_side():
    _, ax = plot_scree(SCREE)
    (band,) = ax.collections
    corners = {
        tuple(round(value, 6) for value in corner) for corner in band.get_paths()[0].vertices
    }
    assert corners == {(0, 3.9), (0, 4.1), (1, 1.8), (1, 2.2), (3, 0.7), (3, 1.3)}


def test_it_draws_where_it_is_told():
    fig = Figure()
    ax = fig.subplots()
    assert plot_scree(SCREE, ax=ax) == (fig, ax)
    assert SCREE.plot(ax) == (fig, ax)
    assert len(ax.lines) == 2


def test_in_a_subfigure_the_figure_around_it_is_returned():
    fig = Figure()
    ax = fig.subfigures(1, 2)[0].subplots()
    assert plot_scree(SCREE, ax=ax) == (fig, ax)


def test_the_chosen_k_and_the_tolerance_are_marked():
    _, ax = plot_scree(SCREE, chosen=1, tolerance=0.5, label="mine")
    _, limit, chosen = ax.lines
    assert chosen.get_xydata().tolist() == [[1, 2]]
    assert limit.get_ydata() == [1.5, 1.5]
    assert texts(ax) == ["mine", "50% above k = 3", "chosen: k = 1"]


@pytest.mark.parametrize(
    ("tolerance", "words"), [(0, "0%"), (0.005, "0.5%"), (0.015, "1.5%"), (0.1, "10%"), (2, "200%")]
)
def test_the_legend_names_the_tolerance_exactly(tolerance, words):
    _, ax = plot_scree(SCREE, tolerance=tolerance)
    assert texts(ax) == [f"{words} above k = 3"]


def test_the_tolerance_of_a_negative_loss_lies_above_it():
    below_zero = td.Scree("1", SCREE.ks, SCREE.loss - 5, SCREE.count, SCREE.cov)  # -1, -3, -4
    _, ax = plot_scree(below_zero, tolerance=0.5)
    assert ax.lines[1].get_ydata() == [-2, -2]


@pytest.mark.parametrize(
    "plot",
    [
        lambda ax: plot_scree(SCREE, ax=ax),
        lambda ax: plot_keep_probability(0.5, 3, ax=ax),
        lambda ax: plot_lengths([0, 3], 0.5, 3, ax=ax),
    ],
)
def test_features_are_counted_in_whole_numbers_on_a_linear_axis_only(plot):
    _, ax = plot(None)
    assert all(tick == round(tick) for tick in ax.get_xticks())
    logarithmic = Figure().subplots()
    logarithmic.set_xscale("log")
    locator = logarithmic.xaxis.get_major_locator()
    plot(logarithmic)
    assert logarithmic.xaxis.get_major_locator() is locator


def test_several_curves_in_one_picture_have_their_own_names_and_colours():
    _, ax = plot_scree(SCREE, label="first")
    plot_scree(SCREE, label="second", ax=ax)
    assert texts(ax) == ["first", "second"]
    first, second = ax.lines
    assert first.get_color() != second.get_color()


def measured_as(features, layer="1", ks=SCREE.ks):
    return td.Scree(layer, ks, SCREE.loss + 1, SCREE.count, SCREE.cov, features)


def test_controls_stand_beside_the_curve_each_with_its_name_line_and_band():
    fig, ax = SCREE.plot(controls=[measured_as("random"), measured_as("principal")])
    assert texts(ax) == ["first features", "random features", "principal components"]
    first, random, principal = ax.lines
    assert first.get_ydata().tolist() == [4, 2, 1]
    assert random.get_ydata().tolist() == principal.get_ydata().tolist() == [5, 3, 2]
    assert len({line.get_linestyle() for line in ax.lines}) == 3
    assert random.get_color() == principal.get_color() != first.get_color()
    assert len(ax.collections) == 3
    assert ax.get_xlabel() == "k, features kept"
    assert plot_scree(SCREE, controls=[measured_as("random")], ax=ax) == (fig, ax)


def test_controls_need_not_have_the_same_ks():
    _, ax = SCREE.plot(controls=[measured_as("random", ks=[1, 2, 3])])
    assert ax.lines[1].get_xdata().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("control", "words"),
    [
        (measured_as("random", layer="*"), r"same layer, '1', got one of '\*'.*layer='1'"),
        (measured_as("first"), r"other features than the curve, got 'first' twice.*label="),
    ],
)
def test_what_is_no_control_is_refused(control, words):
    with pytest.raises(ValueError, match=words):
        SCREE.plot(controls=[control])


def test_of_several_layers_the_widths_are_across():
    widths = td.Scree("*", [0.0, 0.5, 1.0], SCREE.loss, SCREE.count, SCREE.cov)
    _, ax = plot_scree(widths, chosen=0.5, tolerance=0.01)
    assert ax.get_xlabel() == "width, fraction of features kept"
    assert {0.2, 0.4} <= {round(tick, 6) for tick in ax.get_xticks()}
    assert texts(ax) == ["1% above width = 1", "chosen: width = 0.5"]


def test_one_sample_has_no_band():
    once = td.Scree("1", [0, 1], SCREE.loss[:2], count=1, cov=torch.full((2, 2), float("nan")))
    _, ax = once.plot()
    assert ax.lines[0].get_ydata().tolist() == [4, 2]


def test_pyplot_is_not_needed():
    code = (
        "import sys, torch, taildropout as td\n"
        "td.Scree('1', [0, 1], torch.tensor([2.0, 1.0]), 9, torch.eye(2)).plot()\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'taildropout\[plot\]'"):
        SCREE.plot()


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def colours(ax):
    (image,) = ax.images
    return image.cmap(image.norm(image.get_array())).tolist()


def test_a_mask_has_a_row_for_each_sample_and_one_colour_for_what_is_kept():
    fig, ax = plot_mask(MASK)
    assert ax.figure is fig
    kept, dropped = list(to_rgba(KEPT)), list(to_rgba(DROPPED))
    assert colours(ax) == [[kept, kept, dropped], [kept, dropped, dropped]]
    assert ax.get_ylim() == (1.5, -0.5)  # the first sample is on top


@pytest.mark.parametrize("value", [-3.0, 0.01, 7.0, float("nan"), float("inf")])
def test_an_output_shows_what_is_kept_whatever_its_values(value):
    _, ax = plot_mask(torch.where(MASK == 1, value, 0.0).requires_grad_())
    assert colours(ax) == colours(plot_mask(MASK.tolist())[1])


@pytest.mark.parametrize("whole", [torch.ones(2, 3), torch.zeros(2, 3)])
def test_a_mask_without_a_tail_or_without_a_head_keeps_its_colour(whole):
    _, ax = plot_mask(whole)
    assert colours(ax) == [[list(to_rgba(KEPT if whole[0, 0] else DROPPED))] * 3] * 2


def test_a_mask_needs_samples_and_features():
    with pytest.raises(ValueError, match=r"\(samples, features\), got shape \(2, 3, 1\): flatten"):
        plot_mask(MASK[..., None])


def test_the_keep_probability_of_uniform_lengths_falls_in_equal_steps():
    _, ax = plot_keep_probability(td.lengths.Uniform(), 4)
    (steps,) = ax.patches
    np.testing.assert_allclose(steps.get_data().values, [1, 0.75, 0.5, 0.25])
    assert steps.get_data().edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert ax.get_legend() is None


def test_the_keep_probability_of_p_falls_by_a_constant_factor_to_the_mean_of_1_minus_p():
    _, ax = plot_keep_probability(0.3, 5, label="p = 0.3")
    kept = ax.patches[0].get_data().values
    np.testing.assert_allclose(kept.mean(), 0.7)
    np.testing.assert_allclose(kept[1:] / kept[:-1], kept[0])
    assert texts(ax) == ["p = 0.3"]


def test_drawn_ks_are_counted_beside_their_probabilities():
    _, ax = plot_lengths(torch.tensor([[1, 3], [3, 4]]), td.lengths.Sizes([3, 4], [3, 1]), 4)
    (bars,) = ax.patches
    assert bars.get_data().values.tolist() == [0, 0.25, 0, 0.5, 0.25]
    assert bars.get_data().edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]
    (probabilities,) = ax.lines
    np.testing.assert_allclose(
        probabilities.get_xydata(), [[0, 0], [1, 0], [2, 0], [3, 0.75], [4, 0.25]]
    )
    assert texts(ax) == ["4 draws", "probability"]


def test_the_probabilities_of_p_are_those_of_the_exponential_lengths():
    _, ax = plot_lengths([0, 1, 2], 0.5, 2)
    # r + r^2 = 1: the golden ratio.
    r = (5**0.5 - 1) / 2
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1 - r, r * (1 - r), r**2])


@pytest.mark.parametrize(
    ("k", "words"), [([0, 5], "got 0 to 5"), ([-1, 2], "got -1 to 2"), ([], "got none")]
)
def test_draws_outside_of_0_to_n_are_refused(k, words):
    with pytest.raises(ValueError, match=f"from 0 to n = 4, {words}"):
        plot_lengths(k, 0.5, 4)


def test_calibration_is_dropped_against_asked():
    _, ax = plot_calibration([0.25, 0.5], torch.tensor([0.125, 0.75]), label="layer")
    diagonal, points = ax.lines
    assert points.get_xydata().tolist() == [[0.25, 0.125], [0.5, 0.75]]
    assert diagonal.get_xydata().tolist() == [[0.125, 0.125], [0.75, 0.75]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("p asked for", "fraction dropped")
    assert texts(ax) == ["layer"]


def test_predictions_are_up_and_actual_values_across():
    predicted = torch.tensor([[1.0], [3.0]], requires_grad=True)
    _, ax = plot_predictions(predicted, torch.tensor([[2.0], [2.5]]))
    _, points = ax.lines
    assert points.get_xydata().tolist() == [[2, 1], [2.5, 3]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("actual", "predicted")
    assert ax.get_aspect() == 1
    assert ax.get_legend() is None


def test_points_need_as_many_partners():
    with pytest.raises(ValueError, match=r"p and dropped must have one shape.*\(2,\) and \(1,\)"):
        plot_calibration([0.25, 0.5], [0.25])
    with pytest.raises(ValueError, match=r"actual and predicted .*\(0,\) and \(0,\)"):
        plot_predictions([], [])


@pytest.mark.parametrize(
    "plot",
    [
        lambda ax: plot_mask(MASK, ax=ax),
        lambda ax: plot_keep_probability(0.5, 4, ax=ax),
        lambda ax: plot_lengths([0, 1], 0.5, 4, ax=ax),
        lambda ax: plot_calibration([0.5], [0.5], ax=ax),
        lambda ax: plot_predictions([0.5], [0.5], ax=ax),
    ],
)
def test_each_draws_into_the_ax_that_it_gets_or_into_a_new_figure(plot):
    fig = Figure()
    ax, other = fig.subplots(1, 2)
    assert plot(ax) == (fig, ax)
    assert not other.has_data()
    new_fig, new_ax = plot(None)
    assert new_fig is not fig
    assert new_fig.axes == [new_ax]
