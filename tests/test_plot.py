import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import taildropout as td
from taildropout.plot import plot_scree

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


def test_several_curves_in_one_picture_have_their_own_names_and_colours():
    _, ax = plot_scree(SCREE, label="first")
    plot_scree(SCREE, label="second", ax=ax)
    assert texts(ax) == ["first", "second"]
    first, second = ax.lines
    assert first.get_color() != second.get_color()


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
