"""What the method does, in tables, each with its control: docs/evidence.md.

A full run replaces the sections that it measured on that page and leaves the others; with --quick
the tables are printed only.

    python -m benchmarks.evidence [--only NAME] [--quick] [--seeds N] [--first-seed N]
                                  [--rho RHO] [--json FILE] [--read FILE ...]
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from taildropout.shipping.files import written_whole

from ..timing import machine, write_json
from . import (
    convnet,
    deep,
    hermite,
    language,
    longer,
    pca,
    regression,
    retrieval,
    small,
    stratified,
    trained,
    widths,
)
from .report import Numbers, Settings

TABLES: dict[str, ModuleType] = {
    "pca": pca,
    "regression": regression,
    "hermite": hermite,
    "widths": widths,
    "deep": deep,
    "trained": trained,
    "longer": longer,
    "convnet": convnet,
    "language": language,
    "retrieval": retrieval,
    "small": small,
    "stratified": stratified,
}
PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
INTRODUCTION = """\
# Evidence

What the method does, measured against controls, where it helps and where it loses. This page is
written by `python -m benchmarks.evidence` (all of it in about an hour and a half); the
command under each table repeats that table alone, `--quick` prints a small version of it.

Where it costs something: at full width a plain network that is trained for as long as all widths
together is better than one network for all widths, and at the smallest widths an autoencoder of that
width is ([tables](#one-network-for-all-widths-against-a-network-for-each)). What it gains against a
network for each width it gains where training is short: ten times as long, and networks of four
features and more are better by half a point ([table](#does-it-last-with-longer-training)). As a
regulariser the layer does nothing ([table](#regularisation-with-little-data)). Tails that are only zeroed are computed all
the same: with as many FLOPs as the networks of each width, a whole residual network that is nested is
worse than they are ([tables](#a-whole-network-nested-in-one-line)), and so is a deep perceptron at large widths; where the tails
are skipped it is better at every width
([table](#a-deep-network-all-layers-at-one-width)).

Since 24 November 2026 a run prints, beside each curve over k, two controls of the same trained
network: k random features, and the first k principal components of its features
([`features=`](how-to.md#is-the-order-worth-something-controls) of `td.scree`). Sections of an
earlier date do not have them yet.
"""


@dataclass(frozen=True)
class Run:
    """The numbers of one table, and all that it takes to repeat them."""

    settings: Settings
    seeds: list[int]
    cpu_seconds: float
    machine: str
    numbers: Numbers

    @classmethod
    def of(cls, name: str, settings: Settings, seeds: list[int]) -> "Run":
        start = time.process_time()
        numbers = TABLES[name].measure(settings, seeds)
        return cls(settings, seeds, time.process_time() - start, machine(), numbers)

    def markdown(self, name: str) -> str:
        command = f"python -m benchmarks.evidence --only {name}"
        if len(self.seeds) != usual_seeds(name, self.settings):
            command += f" --seeds {len(self.seeds)}"
        if self.seeds[0] != 0:
            command += f" --first-seed {self.seeds[0]}"
        if self.settings.rho != Settings.rho:
            command += f" --rho {self.settings.rho:g}"
        if self.settings.quick:
            command += " --quick"
        seeds = " to ".join(map(str, sorted({self.seeds[0], self.seeds[-1]})))
        return (
            f"## {TABLES[name].TITLE}\n\n{TABLES[name].text(self.numbers, self.settings)}\n\n"
            f"```bash\n{command}\n```\n\nSeeds {seeds}. {self.machine}.\n"
        )


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    runs: dict[str, Run] = {}
    for name, run in read(args.read) if args.read else measured(args):
        runs[name] = run
        print(f"{run.markdown(name)}\n({run.cpu_seconds:.0f} CPU seconds)\n", flush=True)
        write_json(args.json, runs)
        if not run.settings.quick:
            write_section(PAGE, name, run.markdown(name))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=TABLES, action="append", help="this table; repeatable")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, no page")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many, instead of its own")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="the others follow")
    parser.add_argument("--rho", type=float, default=0.7, help="of the table hermite")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here too")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", nargs="+", help="numbers from --json: only write"
    )
    return parser.parse_args(arguments)


def measured(args: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    for name in args.only or TABLES:
        settings = Settings(args.quick, args.rho)
        count = args.seeds or usual_seeds(name, settings)
        yield name, Run.of(name, settings, list(range(args.first_seed, args.first_seed + count)))


def usual_seeds(name: str, settings: Settings) -> int:
    count: int = TABLES[name].SEEDS
    return 1 if settings.quick else count


def read(files: list[Path]) -> Iterator[tuple[str, Run]]:
    for file in files:
        for name, run in json.loads(file.read_text())["results"].items():
            yield name, Run(**run | {"settings": Settings(**run["settings"])})


def write_section(page: Path, name: str, text: str) -> None:
    """Put a section on the page in its place, instead of its last version."""
    old = page.read_text().split("\n## ")[1:] if page.exists() else []
    by_title = {section.partition("\n")[0]: f"## {section.rstrip()}\n" for section in old}
    by_title[TABLES[name].TITLE] = text
    sections = [by_title[table.TITLE] for table in TABLES.values() if table.TITLE in by_title]
    with written_whole(page) as temporary:
        temporary.write_text("\n".join([INTRODUCTION, *sections]))


if __name__ == "__main__":
    main()
