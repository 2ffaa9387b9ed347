"""How the house is laid out, what `import taildropout` brings along, and what it promises."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taildropout as td
from taildropout.demo import data

HOUSE = Path(td.__file__).parent

# ------------------------------------------------------------------- imports point one way

# From the lowest floor up. A room reads what is below it; two on one floor don't know each other.
FLOORS = [
    *("lengths", "draws", "functional", "layers", "losses", "models", "graph measuring"),
    *("pruning", "shipping", "showing integrations", "__init__", "demo", "__main__"),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
EXCEPTION = ("measuring.curve", "showing.plot")  # Scree.plot, when it is called


def imports_in(house):
    """{module: the modules of the house that it imports}, wherever in the file it does so."""
    files = {path.relative_to(house).with_suffix("").parts: path for path in house.rglob("*.py")}
    modules = {".".join(parts).removesuffix(".__init__"): path for parts, path in files.items()}
    return {name: set(imports_of(path, house, modules)) for name, path in modules.items()}


def imports_of(path, house, modules):
    package = path.relative_to(house.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        start = []
        if isinstance(node, ast.ImportFrom):
            start += package[: len(package) + 1 - node.level] if node.level else ()
            start += [node.module] if node.module else []
        for alias in node.names:
            top, *parts = ".".join([*start, alias.name]).split(".")
            if top == house.name:  # the last part may be a module, or a name in one
                whole, rest = ".".join(parts), ".".join(parts[:-1])
                yield whole if whole in modules else rest or "__init__"


def wrong_imports(house):
    """A line for each arrow upwards, and for a circle of files."""
    graph = imports_in(house)
    graph.get(EXCEPTION[0], set()).discard(EXCEPTION[1])
    lines = []
    for module, imported in graph.items():
        for other in imported:
            room, read = module.partition(".")[0], other.partition(".")[0]
            if room != read and FLOOR[room] <= FLOOR[read]:
                lines.append(f"{module} imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as circle:
        lines.append(f"a circle: {' <- '.join(circle.args[1])}")
    return lines


def test_imports_point_one_way():
    assert wrong_imports(HOUSE) == []
    assert EXCEPTION[1] in imports_in(HOUSE)[EXCEPTION[0]]


LOWER = {"lengths.py": "", "layers/__init__.py": "", "models/__init__.py": ""}
WRONG = {
    "a circle": (
        {"layers/one.py": "from .two import x", "layers/two.py": "def f():\n    from . import one"},
        "a circle: layers.(one <- layers.two <- layers.one|two <- layers.one <- layers.two)",
    ),
    "an arrow up": (
        {"lengths.py": "if TYPE_CHECKING:\n    from .layers import one"},
        "lengths imports layers",
    ),
    "an arrow to a room on the same floor": (
        {"graph/a.py": "import house.measuring.b", "measuring/b.py": ""},
        "graph.a imports measuring.b",
    ),
    "the face": ({"__init__.py": "", "models/a.py": "import house"}, "models.a imports __init__"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_import_would_be_found(name, tmp_path):
    files, words = WRONG[name]
    house = tmp_path / "house"
    for file, text in {**LOWER, **files}.items():
        (house / file).parent.mkdir(parents=True, exist_ok=True)
        (house / file).write_text(text)
    (line,) = wrong_imports(house)
    assert re.fullmatch(words, line)


# ------------------------------------------------------------------------- what stands where


def test_the_entry_of_a_room_is_its_docstring():
    for path in HOUSE.glob("*/__init__.py"):
        if path.parent.name not in ("functional", "layers", "demo"):
            (docstring,) = ast.parse(path.read_text()).body
            assert isinstance(docstring.value, ast.Constant)


def test_no_module_has_the_name_of_a_public_function():
    names = {path.stem for path in HOUSE.iterdir() if not path.name.startswith("__")}
    assert not [name for name in names if callable(getattr(td, name, None))]


def test_the_tests_have_the_rooms_of_the_house():
    for path in HOUSE.glob("*/__init__.py"):
        assert list((Path(__file__).parent / path.parent.name).glob("test_*.py")), path.parent.name


def test_every_public_name_stands_in_the_reference():
    pages = (Path(__file__).parents[1] / "docs" / "reference").glob("*.md")
    reference = " ".join(page.read_text() for page in pages).split()
    for name in set(td.__all__) - {"draws", "functional", "lengths"}:  # their names stand there
        assert f"taildropout.{name}" in reference


# ------------------------------------------------------- what the package brings along and promises

EXTRAS = ["matplotlib", "pandas", "sklearn", "plotly", "PIL", "onnx", "transformers", "rich"]
EXTRAS += ["accelerate", "lightning", "peft", "sentence_transformers", "skorch"]


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
