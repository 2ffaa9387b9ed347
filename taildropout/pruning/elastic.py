"""A model at every width, on one set of weights, that computes only what the width needs."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..draws import Draw, draw_uniforms, inverse_cdf
from ..lengths import Lengths
from ..models.copies import PruningError, first_line, structural_copy
from ..models.inputs import (
    Inputs,
    as_arguments,
    call,
    leaving_no_trace,
    of_twice_the_batch,
    tensors_of,
    to_device,
)
from ..models.insert import tail_dropouts
from ..models.together import drawn_as_one
from ..models.width import as_it_was, check_widths, k_at
from .grouped import Batch, Ks, groups_by_width, largest_ks
from .narrowed import Attachment, Narrowed, repeat_ks
from .plan import plan_pruning
from .verify import TOLERANCE, difference_of

_SAMPLES = 16  # at least, of the example inputs repeated, on which groups are compared with masks


class Elastic(nn.Module):
    """A nested model that computes only what the width needs, in training and in use.

    | state | what is computed |
    |---|---|
    | `train()` | each sample draws its width, one for all layers; the samples are arranged by width and cut into groups, and each group runs through the model narrowed to its largest k, with masks for its smaller ones |
    | `train()`, with `widths` | as many groups as widths, each at exactly one of them, without masks |
    | `eval()` | the model |
    | `at_width(elastic, w)`, in either mode | the model narrowed to w |

    Outputs and gradients are those of the model with masks, with the same random state too. The
    narrowed networks have no weights of their own: theirs are slices of the model's, in which
    gradients arrive. They are planned when the object is made, or when a width is first asked for;
    a call plans and copies nothing.

    Where a narrowed network would not be exact, the model runs with masks, and a warning says why:
    where a constant would have to be folded into a bias, say. So it does while a BatchNorm is in
    training mode, since its statistics are those of the whole batch.

    `fully_shard` must be given the Elastic as a whole, and `compile()` compiles each of its networks.

    Args:
        model: with TailDropout layers, as `nest` puts them in; shared, not copied. From now on its
            layers are drawn together. Its modules are read here: change or shard them before, and
            make another Elastic after.
        example_inputs: a tensor (`model(x)`), a tuple (`model(*inputs)`) or a dict
            (`model(**inputs)`) with at least one sample. Samples lie along the first dim.
        groups: into how many groups a batch is cut in training, at most. More leave less of the
            tails in, but each costs a call.
        widths: fractions of the features, 1.0 for all of them. Each gets as many samples of a batch
            as the others, chosen at random; the lengths of the layers are not used.

    Attributes:
        model: the model.
        masked: why the model runs with masks in training; None where it does not.

    Raises:
        ValueError: no TailDropout layer, no groups, a width outside (0, 1].
        PruningError: the model can't be exported.
        TypeError: in training, outputs without one row for each sample, such as a loss.

    Example:
        >>> from taildropout import at_width, nest
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> x = torch.randn(32, 8)
        >>> _ = nest(model, x)
        >>> elastic = Elastic(model, x, groups=4)
        >>> elastic.train()(x).sum().backward()
        >>> with at_width(elastic.eval(), 0.25):
        ...     elastic(x).shape
        torch.Size([32, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        groups: int = 8,
        widths: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.model = model
        self.groups = groups
        self.widths = None if widths is None else check_widths(widths, "*")
        self.example_inputs = example_inputs
        self._compiled: tuple[Any, Any] | None = None
        self._read()

    def _read(self) -> None:
        """All that follows from the model."""
        self._said: set[str] = set()
        self._networks: dict[tuple[Ks, bool], Narrowed | str] = {}
        self._attachments: dict[tuple[Narrowed, ...], Attachment] = {}
        self._norms = [module for module in self.model.modules() if isinstance(module, _NormBase)]
        device = next((tensor.device for tensor in self.model.parameters()), None)
        self._plan = plan_pruning(self.model, 1.0, to_device(self.example_inputs, device))
        self._together = drawn_as_one(self.model)
        layers = tail_dropouts(self.model)
        self._layers = {name: layers[name] for name in self._plan.n}
        self._n = {layers[name]: n for name, n in self._plan.n.items()}
        self._cut_into_groups()

    # --- a call ---------------------------------------------------------------------------------

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            return self._forward(args, kwargs)
        with self._compiling_each():
            return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ks = [layer.set_k_for(n) for layer, n in self._n.items()]
        draws = [k is None and layer.training for k, layer in zip(ks, self._n, strict=True)]
        if all(draws):
            return self._in_training_mode(args, kwargs)
        if not any(draws) and any(k is not None for k in ks):
            network = self._of_one_width(ks)
            if network is not None:
                return network(*args, **kwargs)
        return self.model(*args, **kwargs)

    def _in_training_mode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.widths is None and not self._still_fits():
            self._cut_into_groups()
        masks = self._must_mask(self.masked)
        if masks and self.widths is None:
            return self.model(*args, **kwargs)
        draw = self._together.draw_of_call(self.model, args, kwargs)
        ends = self._ends(len(draw.uniforms))
        ks = self._ks(draw, ends)
        of_samples = {self._layers[name]: draw.by_sample(k) for name, k in ks.items()}
        for layer, k in of_samples.items():
            layer.keep_drawn(k)
        if not masks:
            return self._in_groups((args, kwargs), draw, ends, ks)
        with ExitStack() as stack:
            for layer, k in of_samples.items():
                stack.enter_context(layer.using_k(k))
            return self.model(*args, **kwargs)

    def _in_groups(
        self, arguments: Any, draw: Draw, ends: Sequence[int], ks: Mapping[str, Tensor]
    ) -> Any:
        """Each sample at its own k, or with `widths` in a group of one of them."""
        assert draw.rank is not None
        batch = Batch(arguments, draw.rank, ends)
        masks = ks if self.widths is None else {}
        self._attach(self._in_training)
        outputs = []
        for network, ranks, (args, kwargs) in batch.groups(self._in_training):
            network.set_ks({name: k[ranks].clamp(max=network.k[name]) for name, k in masks.items()})
            outputs.append(network(*args, **kwargs))
        return batch.together(outputs)

    def _of_one_width(self, ks: Sequence[int | Tensor | None]) -> Narrowed | None:
        """The network, ready to be called; None where the model must mask."""
        all_ks = [n if k is None else k for k, n in zip(ks, self._n.values(), strict=True)]
        if any(isinstance(k, Tensor) for k in all_ks):  # of each sample another one
            return None
        network = self._narrowed(tuple(map(int, all_ks)), masks=False)
        if self._must_mask(network if isinstance(network, str) else None):
            return None
        assert isinstance(network, Narrowed)
        self._attach([network])
        network.set_ks({})
        return network

    def _ks(self, draw: Draw, ends: Sequence[int]) -> dict[str, Tensor]:
        """Of each layer, for the samples in the order of their ranks."""
        if self.widths is None:
            return {
                name: inverse_cdf(layer.lengths_for(self._n[layer]), self._n[layer], draw)
                for name, layer in self._layers.items()
            }
        sizes = torch.tensor([0, *ends]).diff()
        of_layers = zip(*self._menu, strict=True)
        return {
            name: torch.tensor(ks).repeat_interleave(sizes)
            for name, ks in zip(self._layers, of_layers, strict=True)
        }

    def _ends(self, samples: int) -> list[int]:
        """The rank where each group ends. Where `widths` don't divide a batch, by chance."""
        if self.widths is None:
            return [int(samples * share) for share in self._shares]
        count = len(self.widths)
        rest = int(torch.randint(count, ())) if samples % count else 0
        return [(samples * (i + 1) + rest) // count for i in range(count)]

    def _must_mask(self, reason: str | None) -> bool:
        """Whether there is a reason to, which is said once."""
        if any(norm.training for norm in self._norms):
            reason = "a BatchNorm in training mode takes its statistics from the whole batch"
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"the model runs with masks and computes its tails: {reason}", stacklevel=4
            )
        return reason is not None

    # --- before a call --------------------------------------------------------------------------

    def _cut_into_groups(self) -> None:
        """Plan the networks of training, and compare them with masks."""
        if self.widths is None:
            self._lengths = self._lengths_now()
            self._shares, ks = groups_by_width(self._n, self.groups)
        else:
            ks = [
                tuple(k_at(w, n, layer.multiple_of) for layer, n in self._n.items())
                for w in self.widths
            ]
        self._menu = ks
        networks = [self._narrowed(one, masks=self.widths is None) for one in ks]
        self._in_training = [network for network in networks if isinstance(network, Narrowed)]
        reasons = [network for network in networks if isinstance(network, str)]
        self.masked = reasons[0] if reasons else self._unlike_masks()

    def _still_fits(self) -> bool:
        """Whether the networks are wide enough for the lengths, which may have changed."""
        if self.masked is None and self._lengths != self._lengths_now():
            self._lengths = self._lengths_now()
            for share, network in zip(self._shares, self._in_training, strict=True):
                ks = largest_ks(self._n, share)
                if any(k > n for k, n in zip(ks, network.k.values(), strict=True)):
                    return False
        return True

    def _narrowed(self, ks: Ks, *, masks: bool) -> Narrowed | str:
        """The network of some ks, or why there is none."""
        if (ks, masks) not in self._networks:
            k = dict(zip(self._layers, ks, strict=True))
            try:
                plan = self._plan.at(k, check=not self._networks)
                network = Narrowed(self.model, plan, masks=masks)
            except PruningError as error:
                self._networks[ks, masks] = str(error)
            else:
                self._networks[ks, masks] = network
                if self._compiled is not None:
                    network.network.compile(*self._compiled[0], **self._compiled[1])
        return self._networks[ks, masks]

    def _attach(self, networks: Sequence[Narrowed]) -> None:
        key = tuple(networks)
        if key not in self._attachments:
            self._attachments[key] = Attachment(self.model, networks)
        self._attachments[key].attach()

    def _lengths_now(self) -> list[Lengths]:
        return [layer.lengths_for(n) for layer, n in self._n.items()]

    def _unlike_masks(self) -> str | None:
        """Why groups would not compute what masks do: found on the example inputs, and on many."""
        inputs = self._plan.example_inputs
        count = next((len(x) for x in tensors_of(inputs) if x.ndim and len(x)), _SAMPLES)
        reason = self._unlike_masks_on(inputs, count)
        while reason is None and count < _SAMPLES:
            inputs, count = of_twice_the_batch(inputs), 2 * count
            if count >= _SAMPLES:
                reason = self._unlike_masks_on(inputs, count)
        return reason

    def _unlike_masks_on(self, inputs: Inputs, count: int) -> str | None:
        masking = structural_copy(self.model).eval()
        repeat_ks(masking)
        with as_it_was(self.model), leaving_no_trace(self.model, inputs) as arguments:
            draw, ends = draw_uniforms(count), self._ends(count)
            ks = self._ks(draw, ends)
            try:
                for name, k in ks.items():
                    tail_dropouts(masking)[name].set_k(draw.by_sample(k))
                expected = call(masking, arguments)
                grouped = self._in_groups(as_arguments(arguments), draw, ends, ks)
                difference = difference_of(expected, grouped)
            except Exception as error:
                return f"in groups it raises {first_line(error)}"
        dtypes = {torch.float32, *(parameter.dtype for parameter in self.model.parameters())}
        # Some models compute in float32 whatever their dtype.
        if difference.relative > max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes):
            return (
                "in groups a sample comes out otherwise, so it depends on the others of its batch"
            )
        return None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As in `nn.Module`: of the model and of each narrowed network by itself."""
        self._compiled = args, kwargs
        networks = [network for network in self._networks.values() if isinstance(network, Narrowed)]
        for module in (self.model, *(network.network for network in networks)):
            module.compile(*args, **kwargs)

    @contextmanager
    def _compiling_each(self) -> Iterator[None]:
        """The compiler takes networks of one class for the same one, and tires of compiling it; and
        it looks for the gradient of a slice, at which torch warns."""
        limit = torch._dynamo.config.recompile_limit + 2 * len(self._networks)
        with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=limit):
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            yield

    def extra_repr(self) -> str:
        parts = [f"groups={self.groups}"] if self.widths is None else [f"widths={self.widths}"]
        return ", ".join([*parts, *([f"masked={self.masked!r}"] if self.masked else [])])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _FOLLOWS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._read()


# What `_read` makes.
_FOLLOWS = {
    *("masked", "_said", "_networks", "_attachments", "_norms", "_plan", "_together", "_layers"),
    *("_n", "_lengths", "_shares", "_menu", "_in_training"),
}
