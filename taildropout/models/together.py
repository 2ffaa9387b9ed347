"""All layers of a network drawn together: in training each sample has one width."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from ..functional.checks import as_dims
from ..layers import TailDropout
from ..layers.hooks import drop_hooks
from ..layers.together import BeginsPass, EndsPass, Together
from .insert import layers_that_fit, tail_dropouts
from .names import unwrapped

Rows = Literal["adjacent", "strided"] | None


def draw_together(model: nn.Module, pattern: str = "*", *, rows: Rows = None) -> "DrawnTogether":
    """Draw one uniform number per sample and pass, of which every layer takes its own quantile.

    In training a sample then has one width in the whole network, as it will have once the network
    is cut, where independent draws train mostly combinations that nobody uses. The layers may
    differ in n and lengths: a sample with a larger number never has a smaller k, in any of them.
    Each k by itself is distributed as before, and the draws of a pass are stratified. In eval,
    and where a k is set, nothing changes.

    A pass is one call of the model, or of a module of it that is called by itself
    (`model.encoder(x)`). It has as many samples as the first tensor of the call has rows: the
    model's `main_input_name` where it says one, else the first argument that is a tensor, or
    holds one. If there is none, or `batch_dim` is not 0, the first layer decides: with `(0, 1)`
    each token has its own number, and with `()` the whole call has one.

    The layers remember it: it is pickled and copied with the model, works in compiled and wrapped
    models (`torch.compile`, DistributedDataParallel, `fully_shard`), and what activation
    checkpointing computes again has the same ks. A later call of this function takes the layers
    that it matches over.

    Args:
        model: changed in place: hooks are added, and nothing to its state dict.
        pattern: of the names of layers, with `*`, `?` and `[...]` as in a shell, or a regular
            expression, `"re:..."`.
        rows: for layers that see several rows of each sample. "adjacent": those of a sample stand
            side by side, as in a view of `(batch, time, n)` as `(batch * time, n)`; "strided":
            the batch is repeated as a whole. None: exactly one row for each sample.

    Returns:
        A handle, with `one_pass()`, `remove()` and `drawn_u`.

    Raises:
        ValueError: no layer of such a name, unknown rows, layers some of which draw for each
            sample and others for each token; in a call, a layer with other rows than samples.
        RuntimeError: in a call, in training inside `nn.DataParallel`; in backward, a layer that a
            checkpoint computes again without the random state of the forward pass, or that is
            compiled inside one while the model hides its tensors, as in a closure.

    Example:
        >>> import torch
        >>> model = nn.Sequential(TailDropout(), nn.ReLU(), TailDropout())
        >>> handle = draw_together(model)
        >>> kept = model(torch.ones(8, 16))
        >>> torch.equal(model[0].drawn_k, model[2].drawn_k)
        True
        >>> torch.equal(kept.sum(1), model[0].drawn_k.float())
        True
    """
    if rows not in (None, "adjacent", "strided"):
        raise ValueError(f"rows must be 'adjacent', 'strided' or None, got {rows!r}")
    model = unwrapped(model)
    layers = layers_that_fit(model, pattern)
    if not layers:
        raise ValueError(
            "pattern must match TailDropout layers of the model, "
            f"{sorted(tail_dropouts(model))}, and none fits {pattern!r}"
        )
    dims = {name: as_dims(layer.batch_dim) for name, layer in layers.items()}
    if len(set(map(len, dims.values()))) > 1:
        raise ValueError(
            "layers that are drawn together must all have one k per sample, or all one per token, "
            f"or all one per call, got batch_dim={dims}"
        )
    return DrawnTogether(model, layers, rows)


class DrawnTogether:
    """Layers that are drawn together, as `draw_together` returns them.

    Attributes:
        layers: the layers by their qualified names.
    """

    def __init__(self, model: nn.Module, layers: dict[str, TailDropout], rows: Rows) -> None:
        self.layers = layers
        self._model = model
        from_inputs = all(as_dims(layer.batch_dim) == (0,) for layer in layers.values())
        self._together = Together(list(layers.values()), rows, from_inputs)
        before = {id(layer.together): layer.together for layer in layers.values()}
        for layer in layers.values():
            layer.together = self._together
        for together in before.values():
            if together is not None:
                for layer in layers.values():
                    together.replace(layer)
                if not together.layers:
                    _drop_hooks(model, together)
        for module in _modules_above(model, set(layers.values())):
            begins = module.register_forward_pre_hook(
                BeginsPass(self._together), prepend=True, with_kwargs=True
            )
            ends = module.register_forward_hook(EndsPass(self._together), always_call=True)
            self._together.last_hook = max(begins.id, ends.id)

    @contextmanager
    def one_pass(self, samples: int | None = None) -> Iterator[None]:
        """One pass inside the with block, whatever is called: in training, one draw for all.

        For a network whose parts are called one by one, or whose inputs don't say how many
        samples there are.

        Args:
            samples: how many samples the pass has. None: the first layer decides.

        Example:
            >>> import torch
            >>> model = nn.ModuleDict({"encoder": TailDropout(), "decoder": TailDropout()})
            >>> handle = draw_together(model)
            >>> with handle.one_pass():
            ...     codes = model.encoder(torch.ones(8, 16))
            ...     output = model.decoder(torch.ones(8, 16))
            >>> torch.equal(codes, output)
            True
        """
        if not self._together.begin_several(samples):
            yield
            return
        try:
            yield
        finally:
            self._together.close()

    @property
    def drawn_u(self) -> Tensor | None:
        """The uniform number of each sample in the last pass; None before the first."""
        drawn = self._together.drawn
        return None if drawn is None else drawn.by_sample(drawn.uniforms)

    def remove(self) -> None:
        """Let each layer draw by itself again."""
        for layer in self.layers.values():
            if layer.together is self._together:
                layer.together = None
        _drop_hooks(self._model, self._together)


def drawn_as_one(model: nn.Module) -> Together:
    """What all layers of a model share, which are drawn together from now on if they are not."""
    found = {layer.together for layer in tail_dropouts(model).values()}
    if len(found) != 1 or None in found:
        return draw_together(model)._together
    (together,) = found
    assert together is not None
    return together


def draw_apart(model: nn.Module) -> None:
    """Let every layer draw by itself again."""
    for layer in tail_dropouts(model).values():
        together, layer.together = layer.together, None
        if together is not None:
            _drop_hooks(model, together)


def _modules_above(model: nn.Module, layers: set[TailDropout]) -> Iterator[nn.Module]:
    """The model, and every other module with one of the layers in it."""
    for module in model.modules():
        inner = set(module.modules()) - {module}
        if module is model or (unwrapped(module) is module and not inner.isdisjoint(layers)):
            yield module


def _drop_hooks(model: nn.Module, together: Together) -> None:
    for module in model.modules():
        drop_hooks(
            module,
            lambda hook: isinstance(hook, BeginsPass | EndsPass) and hook.together is together,
        )
