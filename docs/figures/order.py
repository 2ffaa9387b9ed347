"""How the features order themselves in training: the scree curve, epoch by epoch."""

from fractions import Fraction

from matplotlib.ticker import NullLocator

from taildropout.showing.plot import DROPPED, REFERENCE, plot_scree

from .animate import INK, LAST, STEP, Frames, canvas, inset
from .networks import WIDTH, Networks
from .overview import draw_reconstructions

ERRORS = [0.02, 0.05, 0.1, 0.2]  # that the axis names


def training(networks: Networks) -> Frames:
    """The curves before stay, in grey."""
    screes = [networks.scree_of(model) for _, model in networks.history]
    for i, (epoch, model) in enumerate(networks.history):
        fig, _ = canvas(f"The features order themselves in training: epoch {Fraction(epoch)}")
        ax = inset(fig, 1.75, 1.35, 6.9, 6.2)
        for earlier in screes[:i]:
            ax.plot(earlier.ks, earlier.loss.tolist(), color=DROPPED, lw=1.5, zorder=0)
        ax.plot(screes[i].ks, networks.pca, color=REFERENCE, marker=".", label="PCA")
        plot_scree(screes[i], label="the network", ax=ax)
        ax.set(yscale="log", ylim=(0.012, 0.32))
        ax.set_yticks(ERRORS, [str(error) for error in ERRORS])
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xticks(range(0, WIDTH + 1, 2))
        ax.set_ylabel("held-out squared error", fontsize=12, color=INK)
        ax.set_xlabel("k, features kept", fontsize=12, color=INK)
        ax.legend(frameon=False, fontsize=12, loc="upper right")
        pictures = inset(fig, 9.1, 1.05, 6.5, 6.5)
        draw_reconstructions(pictures, model, networks.images)
        pictures.tick_params(labelsize=12, labelcolor=INK)
        yield fig, LAST if i + 1 == len(screes) else 1.5 * STEP
