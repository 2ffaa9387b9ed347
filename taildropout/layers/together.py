"""One uniform number per sample and pass, for all layers that are drawn together.

The layers hold one small object, `Together`, and ask it for their uniforms. Hooks on the network
tell it when a pass begins and ends; all of it is pickled and copied with the network.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..draws import Draw, draw_uniforms
from .recomputing import Calls, in_backward, may_be_recomputed, random_state


class Pass:
    """One call of the network, or several calls of its parts that are one pass."""

    def __init__(self, seed: Tensor, draw: Draw | None, outermost: nn.Module | None) -> None:
        self.seed = seed
        self.draw = draw  # None until the first layer says how many samples there are
        self.outermost = outermost  # the module that is called from outside
        self.of_several_calls = outermost is None
        self.kept = False  # whether its layers can be looked up, as those in compiled code can't
        self.over = False


class Together:
    """What layers that are drawn together share.

    A pass draws a seed when it begins, and everything else follows from the seed. So whoever
    computes a part of a pass again needs to know the seed only, and every pass takes the same
    from torch's generator.
    """

    def __init__(self, layers: list[nn.Module], rows: str | None, from_inputs: bool) -> None:
        self.layers = layers
        self.rows = rows
        self.from_inputs = from_inputs  # whether a network's inputs tell the number of samples
        self.last_hook = 0
        self._start()

    def _start(self) -> None:
        self.now: Pass | None = None
        self.drawn: Draw | None = None  # of the last pass
        self._calls = Calls()
        self.hidden = False  # whether a pass returned no tensor that could be found
        self._again: tuple[Any, Draw] | None = None
        self._placed: tuple[Any, Draw] | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("layers", "rows", "from_inputs", "last_hook")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # torch numbers hooks anew in each process: another one would take the place of ours.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.last_hook + 1)
        self._start()

    def replace(self, layer: nn.Module, *others: nn.Module) -> None:
        """Others are drawn in the place of a layer, or none."""
        self.layers = [x for x in self.layers if x is not layer] + list(others)

    # --- a pass -----------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module that has layers in it is called."""
        eager = not torch.compiler.is_compiling()
        now = self.now
        if eager and in_backward():
            if now is None or now.over:
                self._open_again(module, self._count_samples(module, args, kwargs))
            return
        if now is not None and not (eager and now.over):
            if eager and now.of_several_calls and now.outermost is None:
                now.outermost = module
            if now.of_several_calls or now.outermost is not module:
                return  # a part of the pass that goes on
        # Else there is none; or one that an interrupt has left behind.
        if module.training or self.in_training():
            if eager and getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "layers that are drawn together can't be trained by nn.DataParallel, whose "
                    "threads share them: use DistributedDataParallel"
                )
            self.open(module, self._count_samples(module, args, kwargs))

    def end(self, module: nn.Module, output: Any) -> None:
        """The module returns, or raises an error."""
        now = self.now
        eager = not torch.compiler.is_compiling()
        if now is None and module.training and eager and not (output is None or in_backward()):
            raise RuntimeError(
                f"a pass of {type(module).__name__} ended inside itself, as where a module calls "
                "itself: call it inside one_pass()"
            )
        if now is None or now.outermost is not module:
            return
        if eager:
            self._reopen_in_backward(now, output)
        if now.of_several_calls:
            now.outermost = None
        else:
            self.close()

    def in_training(self) -> bool:
        return any(layer.training for layer in self.layers)

    def begin_several(self, samples: int | None) -> bool:
        """Begin a pass of several calls, unless one goes on already or nothing is in training."""
        eager = not torch.compiler.is_compiling()
        if eager and in_backward():
            return self._open_again(None, samples)
        if (self.now is not None and not self.now.over) or not self.in_training():
            return False
        self.open(None, samples)
        return True

    def draw_of_call(self, module: nn.Module, args: Any, kwargs: Any) -> Draw:
        """What the samples of a call draw, for whoever lets no layer draw in it."""
        begun = self.begin_several(self._count_samples(module, args, kwargs))
        now = self.now
        if begun:
            self.close()
        if now is None or now.draw is None:
            raise ValueError(
                "the inputs must tell how many samples there are, by a tensor whose first dim they "
                "lie along, and hold none"
            )
        return now.draw

    def open(self, outermost: nn.Module | None, samples: int | None) -> None:
        """Begin a pass, of a known number of samples or of as many as the first layer has."""
        kept = not torch.compiler.is_compiling() and may_be_recomputed()
        state = random_state() if kept else None
        seed = _draw_seed()
        if state is not None:
            self._calls.keep(seed, "pass", state)
        draw = None if samples is None else _draw_of_seed(seed, samples)
        self.now = Pass(seed, draw, outermost)

    def close(self) -> None:
        """End the pass."""
        if self.now is None:
            return
        eager = not torch.compiler.is_compiling()
        if not (eager and in_backward()):
            self.drawn = self.now.draw
        self.now.over = True
        self.now = None
        if eager:
            _draw_seed()  # no later call sees a random state of this pass, unless it is put back

    def _open_again(self, outermost: nn.Module | None, samples: int | None) -> bool:
        """In backward, if a pass began here: the whole of it is computed again."""
        seed = self._calls.find("pass", random_state())
        if seed is None:
            return False
        _draw_seed()  # as when it began
        draw = None if samples is None else _draw_of_seed(seed, samples)
        self.now = Pass(seed, draw, outermost)
        return True

    def _reopen_in_backward(self, now: Pass, output: Any) -> None:
        """Have the pass open when backward reaches it: compiled code can look nothing up."""
        if torch.is_grad_enabled() and output is not None:
            tensors = list(_tensors_of(output))
            self.hidden = self.hidden or not tensors
            for node in {tensor.grad_fn for tensor in tensors}:
                if node is not None:
                    node.register_prehook(_Reopen(self, now))

    def _count_samples(self, module: nn.Module, args: Any, kwargs: Any) -> int | None:
        """From what the module is called with; None: its first layer decides."""
        if not self.from_inputs:
            return None
        main = kwargs.get(getattr(module, "main_input_name", None))
        for value in (main, *args, *kwargs.values()):
            if isinstance(value, Mapping):
                inner: Any = value.values()
            else:
                inner = value if isinstance(value, tuple | list) else (value,)
            for tensor in inner:
                if isinstance(tensor, Tensor) and tensor.ndim:
                    return tensor.shape[0]
        return None

    # --- a layer ----------------------------------------------------------------------------

    def draw(self, count: int, device: torch.device) -> Draw:
        """What a layer draws for its samples: what every other layer draws for them."""
        now = self.now
        if torch.compiler.is_compiling():
            if now is None:
                return _draw_of_seed(_draw_seed(), count).to(device)
            if now.draw is None:
                now.draw = _draw_of_seed(now.seed, count)
            return self._place(now.draw, count, device)
        again = in_backward()
        alone = now is None or now.over
        if alone:  # a layer by itself is a pass, too
            alone = self._open_again(None, count) if again else self._opened(count)
        try:
            draw = self._look_up(count) if again else self._of_this_pass(count)
        finally:
            if alone:
                self.close()
        key = (draw, count, device)
        if self._placed is None or self._placed[0] != key:
            self._placed = (key, self._place(draw, count, device))
        return self._placed[1]

    def _opened(self, samples: int) -> bool:
        self.open(None, samples)
        return True

    def _of_this_pass(self, count: int) -> Draw:
        now = self.now
        assert now is not None
        if now.draw is None:
            now.draw = _draw_of_seed(now.seed, count)
        if may_be_recomputed() and (state := random_state()) is not None:
            self._calls.keep((now.seed, len(now.draw.uniforms)), "layer", state, count)
            now.kept = True
        return now.draw

    def _look_up(self, count: int) -> Draw:
        found = self._calls.find("layer", random_state(), count)
        if found is None and self.now is not None and self.now.draw and not self.now.kept:
            return self.now.draw  # it was compiled, and no longer is
        if found is None:
            raise RuntimeError(
                "a layer that is drawn together must be computed in backward as it was in the "
                "forward pass, and this call was not in it: let the checkpoint keep the random "
                "state (preserve_rng_state=True), and set the same k, or none, in both"
            )
        if self._again is None or self._again[0] is not found:
            self._again = (found, _draw_of_seed(*found))
        return self._again[1]

    def _place(self, draw: Draw, count: int, device: torch.device) -> Draw:
        """For so many rows of the samples, on the layer's device."""
        samples = len(draw.uniforms)
        if count != samples:
            if self.rows is None or samples == 0 or count % samples:
                raise ValueError(self._wrong_rows(count, samples))
            draw = draw.repeated(count // samples, adjacent=self.rows == "adjacent")
        return draw.to(device)

    def _wrong_rows(self, count: int, samples: int) -> str:
        message = (
            "a layer that is drawn together must have one row for each sample of the pass, got "
            f"{count} rows for {samples} samples"
        )
        if self.rows is not None:
            return f"{message}: with rows={self.rows!r} the same number of rows for each"
        return (
            f"{message}: if each sample has several rows, say rows='adjacent' or rows='strided'; "
            "if parts of the network run on other batches, call each part by itself; if the "
            "inputs don't tell the number of samples, call the network inside one_pass()"
        )


# --- from a seed to uniforms --------------------------------------------------------------------


def _draw_seed() -> Tensor:
    return torch.randint(2**63 - 1, (), device="cpu")


def _draw_of_seed(seed: Tensor, samples: int) -> Draw:
    if torch.compiler.is_compiling():
        uniforms, rank = _uniforms_of_seed(seed, samples)
        return Draw(uniforms, rank, torch.device("cpu"))
    try:
        generator = torch.Generator().manual_seed(int(seed))
    except RuntimeError:  # of a seed that has no one value, as inside vmap
        return draw_uniforms(samples)
    return draw_uniforms(samples, generator=generator)


# Of passes in compiled code: what backward computes again has the seed of one of them. Another
# seed in backward is of a call that in the forward pass was a part of a pass outside.
_compiled_seeds = Calls()
_LOST_PASS = (
    "compiled layers that are drawn together, in a checkpoint that is not compiled, must be computed "
    "in backward in the pass that they were in, and it was not found from what the model returned: "
    "return the tensors themselves, or in containers and plain objects; or compile the model as a "
    "whole, with its checkpoints; or use no checkpoint"
)


@torch.library.custom_op("taildropout::uniforms_of_seed", mutates_args=())
def _uniforms_of_seed(seed: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """A function of the seed, which the compiler may run again, or leave out."""
    if in_backward():
        if _compiled_seeds.find(int(seed)) is None:
            raise RuntimeError(_LOST_PASS)
    else:
        _compiled_seeds.keep(True, int(seed))
    draw = _draw_of_seed(seed, samples)
    assert draw.rank is not None
    return draw.uniforms, draw.rank


@_uniforms_of_seed.register_fake
def _(seed: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    return seed.new_empty(samples, dtype=torch.float64), seed.new_empty(samples)


# --- hooks --------------------------------------------------------------------------------------


class BeginsPass:
    """A forward pre-hook of the network, and of all modules that have such a layer in them."""

    def __init__(self, together: Together) -> None:
        self.together = together

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.together.begin(module, args, kwargs)


class EndsPass:
    """A forward hook of the same modules, called after an error, too."""

    def __init__(self, together: Together) -> None:
        self.together = together

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.together.end(module, output)


class _Reopen:
    """A hook of autograd on what a pass returned."""

    def __init__(self, together: Together, closed: Pass) -> None:
        self.together, self.closed = together, closed

    def __call__(self, *grads: Any) -> None:
        if self.together.hidden:
            return  # what is computed again may be of the other pass: compiled code would not notice
        self.together.now = self.closed
        torch.autograd.Variable._execution_engine.queue_callback(self.after_backward)

    def after_backward(self) -> None:
        if self.together.now is self.closed:
            self.together.now = None


def _tensors_of(output: Any) -> Iterator[Tensor]:
    """In an output, and in the attributes of objects in it, however deep."""
    rest, seen = [output], set[int]()
    while rest and len(seen) < _MOST_OBJECTS:
        for leaf in tree_leaves(rest.pop()):
            if isinstance(leaf, Tensor):
                yield leaf
            elif id(leaf) not in seen and not isinstance(leaf, nn.Module | type):
                seen.add(id(leaf))
                rest.extend(_attributes_of(leaf))


_MOST_OBJECTS = 10_000  # looked into: one may hold the whole data set


def _attributes_of(value: Any) -> Iterator[Any]:
    yield from getattr(value, "__dict__", {}).values()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(value, name, None)
    if isinstance(value, Mapping):  # of a class that torch does not know
        yield from value.values()
