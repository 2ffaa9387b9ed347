"""`taildropout demo`: the whole path, from training to a verified smaller network on disk."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import taildropout as td

from ..pruning.sweep import seconds_per_call
from ..shipping.files import written_whole
from . import data
from .model import Autoencoder, pca_errors, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 16
EPOCHS = {"digits": 300, "fashion-mnist": 12}
TOLERANCE = 0.05
SHOWN = 10  # images in reconstructions.png


def main(argv: Sequence[str] | None = None) -> None:
    """The command `taildropout`."""
    parser = argparse.ArgumentParser(
        prog="taildropout", description="Train once, choose the width later."
    )
    parser.add_argument("--version", action="version", version=td.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "demo",
        help="train an autoencoder on real images, choose its width, cut it, check it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--data", choices=list(EPOCHS), default="digits", help="the images")
    command.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where the IDX files of Fashion-MNIST are"
    )
    command.add_argument(
        "--width", type=_positive, default=WIDTH, metavar="N", help="features of the bottleneck"
    )
    command.add_argument(
        "--epochs", type=_positive, metavar="N", help="passes over the images (default: by data)"
    )
    command.add_argument(
        "--out", type=Path, default="taildropout-demo", metavar="DIR", help="where to write"
    )
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="of all random numbers")
    arguments = parser.parse_args(argv)
    if arguments.data == "digits" and arguments.data_dir is not None:
        command.error("--data-dir is for --data fashion-mnist: the digits need no files")
    try:
        demo(
            arguments.data,
            data_dir=arguments.data_dir,
            width=arguments.width,
            epochs=arguments.epochs or EPOCHS[arguments.data],
            out=arguments.out,
            seed=arguments.seed,
        )
    except (data.DataError, ImportError, OSError) as error:
        sys.exit(f"taildropout demo: {error}")
    except KeyboardInterrupt:
        sys.exit("taildropout demo: interrupted")


def demo(
    name: str, *, data_dir: Path | None, width: int, epochs: int, out: Path, seed: int
) -> dict[str, Any]:
    """Run the whole path, print it, and write its files into `out`.

    Returns:
        All numbers that are printed, as in results.json.
    """
    # Before the training, not after it.
    from matplotlib.figure import Figure  # noqa: F401
    from plotly.offline import get_plotlyjs  # noqa: F401

    started = time.perf_counter()
    images = data.load(name, data_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    pixels = images.train.shape[1]
    model = Autoencoder(pixels, width)
    print(
        f"{name}: {len(images.train):,} images to learn, {len(images.test):,} held out, "
        f"{images.height} x {images.width} pixels\n"
        f"autoencoder with {width} features, of which TailDropout keeps a random first few"
    )
    train(model, images.train, epochs=epochs)

    batches = [(batch, batch) for batch in images.test.split(1000)]
    scree = td.scree(model, nn.MSELoss(), batches)
    pca = pca_errors(images.train, images.test, scree.ks)
    parameters = _parameters_by_k(model, scree.ks)
    k = scree.choose(TOLERANCE)
    print(_table(scree, pca, parameters, k))
    print(
        f"\nchosen: k = {k}, the smallest that surely (95 %) loses less than {TOLERANCE:.0%} "
        f"against all {width} features"
    )

    model.eval()
    plan = td.plan_pruning(model, k, images.test[:8])
    small = plan.apply(model)
    print(f"\n{plan.summary()}")
    with torch.no_grad(), td.at_width(model, k):
        difference = float((small(images.test) - model(images.test)).abs().max())
    large_time, small_time = seconds_per_call([model, small], images.test[:1000])
    print(
        f"\nlargest difference between its outputs and the large network's at k = {k}: "
        f"{difference:.1e}\n"
        f"time for {len(images.test[:1000]):,} images: {large_time * 1e3:.1f} ms -> "
        f"{small_time * 1e3:.1f} ms"
    )

    td.save_pruned(small, plan, out / "model.safetensors")
    loaded = td.load_pruned(Autoencoder(pixels, width), out / "model.safetensors").eval()
    with torch.no_grad():
        reloaded_equal = bool(torch.equal(loaded(images.test), small(images.test)))
    print(f"saved and loaded again: {'the same' if reloaded_equal else 'NOT the same'} outputs")

    td.report(
        model,
        scree,
        images.test,
        out / "report.html",
        labels=images.test_labels,
        contrast=images.contrast,
        image_shape=(images.height, images.width),
        tolerance=TOLERANCE,
        title=f"Autoencoder on {name}, at every width",
    )

    results = {
        "data": name,
        "seed": seed,
        "epochs": epochs,
        "width": width,
        "scree": scree.to_dict(),
        "stderr": scree.stderr.tolist(),
        "pca": pca,
        "parameters": parameters,
        "tolerance": TOLERANCE,
        "chosen_k": k,
        "parameters_before": plan.before.parameters,
        "parameters_after": plan.after.parameters,
        "largest_difference": difference,
        "seconds_per_batch_before": large_time,
        "seconds_per_batch_after": small_time,
        "reloaded_equal": reloaded_equal,
        "seconds": time.perf_counter() - started,
    }
    _save(out / "scree.png", _scree_figure(scree, pca, k, name).savefig)
    _save(out / "reconstructions.png", _reconstructions(model, images, scree.ks[-1]).savefig)
    _save(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    files = ", ".join(sorted(path.name for path in out.iterdir() if not path.name.startswith(".")))
    print(f"\n{results['seconds']:.0f} s. In {out}/: {files}")
    return results


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be in 0, ..., 2^63 - 1, got {value}")
    return value


def _parameters_by_k(model: Autoencoder, ks: list[int]) -> list[int]:
    """Parameters of the network that is cut to k features, for each k."""
    into, out_of = model.encoder[-1], model.decoder[0]
    assert isinstance(into, nn.Linear)
    assert isinstance(out_of, nn.Linear)
    of_one_feature = into.in_features + 1 + out_of.out_features
    total = sum(parameter.numel() for parameter in model.parameters())
    return [total - (into.out_features - k) * of_one_feature for k in ks]


def _table(scree: td.Scree, pca: list[float], parameters: list[int], chosen: int) -> str:
    lines = [f"\n{'k':>4}  {'held-out error':^19}  {'PCA':>7}  {'parameters':>10}"]
    rows = zip(scree.ks, scree.loss.tolist(), scree.stderr.tolist(), pca, parameters, strict=True)
    for k, loss, stderr, pca_loss, count in rows:
        mark = "  <- chosen" if k == chosen else ""
        lines.append(f"{k:>4}  {loss:.5f} ± {stderr:.5f}    {pca_loss:.5f}  {count:>10,}{mark}")
    return "\n".join(lines)


def _scree_figure(scree: td.Scree, pca: list[float], chosen: int, name: str) -> "Figure":
    from matplotlib.figure import Figure

    from ..showing.plot import plot_scree

    fig = Figure(figsize=(6, 4), layout="constrained")
    ax = fig.subplots()
    ax.plot(scree.ks, pca, color="0.6", marker=".", label="PCA")
    plot_scree(scree, chosen=chosen, tolerance=TOLERANCE, label="one network, cut at k", ax=ax)
    ax.set_title(f"Autoencoder on {name}: trained once, measured at every width")
    ax.set_ylabel("held-out mean squared error")
    ax.set_ylim(bottom=0)
    return fig


@torch.no_grad()
def _reconstructions(model: Autoencoder, images: data.Images, n: int) -> "Figure":
    """Rows: the input, then its reconstruction from the first k = 1, 2, 4, ..., n features."""
    from matplotlib.figure import Figure

    ks = sorted({*(2**i for i in range(n.bit_length())), n})
    shown = images.test[:SHOWN]
    rows = [("input", shown)]
    for k in ks:
        with td.at_width(model, k):
            rows.append((f"k = {k}", model(shown)))
    columns = len(shown)
    fig = Figure(figsize=(0.8 * columns + 1, 0.8 * len(rows)), layout="constrained")
    for row, axes in zip(rows, fig.subplots(len(rows), columns, squeeze=False), strict=True):
        for pixels, ax in zip(row[1], axes, strict=True):
            ax.imshow(
                pixels.view(images.height, images.width).numpy(), cmap="gray_r", vmin=0, vmax=1
            )
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axes[0].set_ylabel(row[0], rotation=0, ha="right", va="center")
    return fig


def _save(path: Path, write: Callable[[Path], Any]) -> None:
    with written_whole(path) as temporary:
        write(temporary)
