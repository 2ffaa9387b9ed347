"""The programs in examples/ run, and what they print is what they are there to show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name):
    """Lines, and the numbers in them."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.?\d*", line)]


def live_scree():
    """The loss falls with k, on both sides of the table, and the curve stands beside the bar."""
    lines, progress = output_of("live_scree.py")
    table = [numbers(line) for line in lines[1:8]]
    assert [row[0] for row in table] == [0, 1, 2, 4, 8, 16, 32]
    for column in (1, 3):  # each is followed by its standard error
        losses = [row[column] for row in table]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] / 2
    assert re.fullmatch(r"k = \d+ of 32: .*", lines[8])
    curve = re.findall(r"[▁-█]+", progress)[-1]
    assert len(curve) == 33
    assert curve[0] > curve[-1]


def every_prefix():
    """Both ways reach about the same accuracy, the more features the more."""
    lines, _ = output_of("every_prefix.py")
    exact, sampled = (numbers(line) for line in lines[1:])
    assert (lines[1][:12], lines[2][:7]) == ("every prefix", "sampled")
    for *accuracies, milliseconds in (exact, sampled):
        assert len(accuracies) == 7
        assert accuracies[0] < 50
        assert accuracies[-1] > 85
        assert milliseconds > 0


CHECKS = {"live_scree.py": live_scree, "every_prefix.py": every_prefix}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name):
    CHECKS[name]()  # each has its own
