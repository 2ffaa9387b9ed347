"""What `import taildropout` brings along, and what it promises."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taildropout as td
from taildropout.demo import data

EXTRAS = ["matplotlib", "pandas", "sklearn", "plotly", "PIL", "onnx", "transformers", "rich"]


def imported_extras(before=""):
    code = f"{before}\nimport sys, taildropout\nprint([m for m in {EXTRAS} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_importing_the_package_imports_no_extra():
    assert imported_extras() == "[]"


def test_the_check_would_find_one():
    assert imported_extras(before="import pandas") == "['pandas']"


def test_every_public_name_is_there():
    assert sorted(td.__all__) == list(td.__all__)
    for name in td.__all__:
        assert getattr(td, name).__name__.rpartition(".")[2] == name


def test_the_version_is_that_of_the_distribution():
    assert td.__version__ == importlib.metadata.version("taildropout")


def test_types_are_shipped():
    assert (Path(td.__file__).parent / "py.typed").is_file()


def test_the_entry_point_fits_in_thirty_lines():
    assert len(Path(td.__file__).read_text().splitlines()) <= 30


SCREE = td.Scree("1", [0, 1], torch.tensor([2.0, 1.0]), 9, torch.eye(2))


@pytest.mark.parametrize(
    ("module", "use", "extra"),
    [
        ("pandas", SCREE.to_pandas, "pandas"),
        ("matplotlib.figure", SCREE.plot, "plot"),
        ("sklearn.datasets", data.load_digits, "demo"),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_mends_it(monkeypatch, module, use, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'taildropout\[{extra}\]'"):
        use()
