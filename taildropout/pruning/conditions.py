"""What the promise of a plan rests on, in the user's words."""

import inspect
from collections.abc import Iterator, Sequence

from torch.export.graph_signature import ConstantArgument, InputKind

from ..graph.dataflow import Dataflow
from ..graph.exports import Export
from ..models.inputs import as_arguments
from .cuts import Cut
from .predicted import MOST_WITH_SYMBOLS


def conditions_of(flow: Dataflow, cuts: Sequence[Cut]) -> tuple[str, ...]:
    """All that must hold for the small network to compute what the large one computes.

    Nothing where nothing is cut.
    """
    if not cuts:
        return ()
    return (
        "all numbers inside the network are finite: zero times an infinite one is NaN",
        *_of_arguments(flow, flow.paths.exports[0]),
        *(f"the inputs are not of {sizes}" for sizes in flow.paths.unread),
        *_of_comparisons(flow.paths.exports[0]),
    )


def _of_arguments(flow: Dataflow, export: Export) -> Iterator[str]:
    """Code asks which arguments are given, and what those are that are no tensors."""
    for spec in export.program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, ConstantArgument):
            yield f"the argument {spec.arg.name!r} is {spec.arg.value!r}, as in the example inputs"
    args, kwargs = as_arguments(export.inputs)
    left_out, optional = [], []
    for i, parameter in enumerate(inspect.signature(flow.model.forward).parameters.values()):
        given = i < len(args) or parameter.name in kwargs
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not given:
            left_out.append(repr(parameter.name))
        elif parameter.default is not parameter.empty:
            optional.append(repr(parameter.name))
    if optional:
        yield f"these arguments are given, as in the example inputs: {', '.join(optional)}"
    if left_out:
        yield f"these arguments are left out, as in the example inputs: {', '.join(left_out)}"


def _of_comparisons(export: Export) -> Iterator[str]:
    if len(export.nodes) > MOST_WITH_SYMBOLS and any(export.symbols):
        yield "the model's code does not compare the sizes of its inputs with widths that are cut"
