"""One style for all animations, and writing them as GIF and MP4."""

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from taildropout.shipping.files import written_whole
from taildropout.showing.plot import CHOSEN, DROPPED, KEPT, REFERENCE

IMAGES = Path(__file__).parent.parent / "images"
DPI = 125  # 1000 x 562 pixels: sharp where the page shows it 800 wide
STEP = 0.5  # seconds that one step is shown
LAST = 3.0  # seconds that the last step is shown
RATE = 25  # frames per second of the MP4; a GIF counts in hundredths of a second
MOVES = 4  # frames of the movement from one step to the next

INK = "0.2"
FAINT = "0.45"
Frames = Iterable[tuple[Figure, float]]  # each figure, and the seconds that it is shown


def canvas(title: str) -> tuple[Figure, Axes]:
    """A figure with one ax all over it, 16 units wide and 9 high, and a title on top."""
    fig = Figure(figsize=(8, 4.5), dpi=DPI)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 16), ylim=(0, 9))
    ax.set_axis_off()
    ax.text(8, 8.35, title, ha="center", va="center", fontsize=16, color=INK)
    return fig, ax


def inset(fig: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """A further ax, placed in the units of `canvas`."""
    return fig.add_axes((left / 16, bottom / 9, width / 16, height / 9))


def strip(fig: Figure, ks: Sequence[int], name: str, across: str = "k, features kept") -> Axes:
    """An ax along the bottom, for something against k."""
    ax = inset(fig, 2.2, 1.15, 13.2, 2.1)
    ax.set_xticks(ks)
    ax.set_xlabel(across, fontsize=11, color=INK)
    ax.set_ylabel(name, fontsize=11, color=INK)
    ax.tick_params(labelsize=10, colors=FAINT)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(REFERENCE)
    ax.locator_params(axis="y", nbins=4)
    return ax


def scree_strip(
    fig: Figure,
    ks: Sequence[int],
    loss: Sequence[float],
    now: int,
    name: str,
    across: str = "k, features kept",
) -> None:
    """The loss against k along the bottom, up to the k that is shown `now`."""
    ax = strip(fig, ks, name, across)
    ax.plot(ks, loss, color=DROPPED, marker=".", zorder=1)
    seen = ks.index(now) + 1
    ax.plot(ks[:seen], loss[:seen], color=KEPT, marker=".", lw=2, zorder=2)
    ax.plot(now, loss[seen - 1], "o", color=CHOSEN, markersize=9, zorder=3, clip_on=False)
    ax.set_ylim(bottom=0)


def box(ax: Axes, left: float, bottom: float, size: float, amount: float, text: str = "") -> None:
    """A square in the colour of what is kept, or dropped, or between: `amount` from 1 to 0."""
    ax.add_patch(
        Rectangle((left, bottom), size, size, facecolor=shade(amount), edgecolor="white", lw=1.5)
    )
    colour = "white" if amount > 0.5 else FAINT
    centre = (left + size / 2, bottom + size / 2 - 0.02)
    ax.text(*centre, text, ha="center", va="center", fontsize=11, color=colour)


def shade(amount: float) -> tuple[float, ...]:
    """Between the colour of what is dropped and that of what is kept."""
    mixed = (1 - amount) * np.array(to_rgb(DROPPED)) + amount * np.array(to_rgb(KEPT))
    return tuple(mixed.tolist())


def steps(
    states: NDArray[np.float64], seconds: float = STEP, moves: int = MOVES
) -> Iterator[tuple[int, NDArray[np.float64], float]]:
    """Each state, and before it the way from the last one: `(index, state, seconds to show it)`."""
    for i, state in enumerate(states):
        before = states[max(i - 1, 0)]
        for move in range(1, moves + 1) if i else ():
            t = move / (moves + 1)
            yield i, before + (state - before) * t * t * (3 - 2 * t), 1 / RATE  # gentle at the ends
        yield i, state, LAST if i + 1 == len(states) else seconds


def save_picture(name: str, fig: Figure) -> None:
    """Write docs/images/`name`.png."""
    IMAGES.mkdir(exist_ok=True)
    with written_whole(IMAGES / f"{name}.png") as path:
        fig.savefig(path, dpi=110)


def save_animation(name: str, frames: Frames) -> None:
    """Write docs/images/`name`.gif, and .mp4 where ffmpeg is there."""
    pictures, seconds = [], []
    for fig, duration in frames:
        pictures.append(_pixels(fig))
        seconds.append(duration)
    IMAGES.mkdir(exist_ok=True)
    with written_whole(IMAGES / f"{name}.gif") as path:
        _write_gif(path, pictures, seconds)
    if shutil.which("ffmpeg"):
        with written_whole(IMAGES / f"{name}.mp4") as path:
            _write_mp4(path, pictures, seconds)


def _pixels(fig: Figure) -> NDArray[np.uint8]:
    agg = FigureCanvasAgg(fig)
    agg.draw()
    rgb = np.asarray(agg.buffer_rgba())[..., :3]
    return rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2].copy()  # H.264 wants even sizes


def _write_gif(path: Path, pictures: list[NDArray[np.uint8]], seconds: list[float]) -> None:
    # One palette for all frames: what stands still keeps its colour, and is stored once.
    palette = _palette(pictures)
    first, *rest = (_indexed(picture, palette) for picture in pictures)
    first.save(
        path,
        save_all=True,
        append_images=rest,
        duration=[round(1000 * duration) for duration in seconds],
        loop=0,
        optimize=True,
    )


def _palette(pictures: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """A third of the 256 colours: they are enough, and keep the file small."""
    # Averages are close to the colours that have a meaning, and to grey, but not exactly these.
    names = ["white", KEPT, DROPPED, CHOSEN, REFERENCE, *(str(i / 16) for i in range(16))]
    exact = np.array([to_rgb(name) for name in names]) * 255
    some = Image.fromarray(np.concatenate(pictures[:: max(1, len(pictures) // 24)]))
    averages = some.quantize(64, method=Image.Quantize.MEDIANCUT).getpalette()
    return np.concatenate([exact.round().astype(np.int64), np.array(averages).reshape(-1, 3)])


def _indexed(picture: NDArray[np.uint8], palette: NDArray[np.int64]) -> Image.Image:
    """Each pixel in the nearest colour; Pillow's own way is only about right."""
    red, green, blue = np.moveaxis(picture.astype(np.int64), 2, 0)
    packed, where = np.unique((red << 16) + (green << 8) + blue, return_inverse=True)
    colours = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1)
    nearest = ((colours[:, None] - palette) ** 2).sum(2).argmin(1).astype(np.uint8)
    image = Image.fromarray(nearest[where].reshape(red.shape))
    image.putpalette(palette.ravel().tolist())
    return image


def _write_mp4(path: Path, pictures: list[NDArray[np.uint8]], seconds: list[float]) -> None:
    height, width, _ = pictures[0].shape
    command = ["ffmpeg", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(RATE), "-i", "-"]
    command += ["-c:v", "libx264", "-preset", "slow", "-tune", "animation", "-crf", "20"]
    command += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as ffmpeg:
        assert ffmpeg.stdin is not None
        for picture, duration in zip(pictures, seconds, strict=True):
            for _ in range(round(duration * RATE)):
                ffmpeg.stdin.write(picture.tobytes())
    if ffmpeg.returncode:
        raise subprocess.CalledProcessError(ffmpeg.returncode, command)
