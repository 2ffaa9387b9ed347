"""What the timed benchmarks share: taking turns, medians, the machine, the table, the arguments."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float


def parser(description: str | None) -> argparse.ArgumentParser:
    """With --quick and --json FILE."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="fewer cases and rounds, noisier")
    result.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here too")
    return result


def take_turns(
    rivals: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.03
) -> dict[str, Time]:
    """Time the rivals interleaved: in each round every one runs for about `seconds`."""
    calls = {}
    for name, call in rivals.items():
        call()
        call()
        calls[name] = max(1, round(seconds / max(_seconds(call, 1), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            times[name].append(_seconds(call, calls[name]))
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = Time(median, low, high)
    return result


def _seconds(call: Callable[[], object], calls: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def machine() -> str:
    name = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    return (
        f"{name}, {threads} thread{'s' if threads > 1 else ''}{gpu}, torch {torch.__version__}, "
        f"{date.today()}"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def human(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def write_json(path: Path | None, results: object) -> None:
    if path is not None:
        record = {"machine": machine(), "results": results}
        path.write_text(json.dumps(record, indent=1, default=asdict) + "\n")
