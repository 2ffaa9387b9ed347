"""The checks of the zoo. A file that imports them all runs each of them on each of its `CASES`."""

import copy
import functools
import inspect
from dataclasses import dataclass

import pytest
import torch
from helpers.oracle import assert_same, assert_same_outputs, masked, snapshot
from helpers.zoo.case import ANY, Case
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout.models.copies import tensors_by_name

PLACES = ["one", "half", "all but one", "all", "none"]


def each(*places, where=lambda case, place: True):
    """A check of every case `p`, pruned to each of the places."""

    def chosen(check):
        check.places, check.where = places, where
        return check

    return chosen


def pytest_generate_tests(metafunc):
    """Where a file is not slow as a whole, half of the features is the place that is quick."""
    if "p" in metafunc.fixturenames:
        check = metafunc.function
        metafunc.parametrize(
            "p",
            [
                pytest.param(
                    (name, place),
                    id=f"{name}-{place}" if len(check.places) > 1 else name,
                    marks=[
                        *([] if place == "half" else [pytest.mark.slow]),
                        *([pytest.mark.long] if case.long else []),
                    ],
                )
                for name, case in metafunc.module.CASES.items()
                for place in check.places
                if check.where(case, place)
            ],
            indirect=True,
        )


@pytest.fixture
def p(request):
    name, place = request.param
    return pruned(name, place, request.module.CASES[name])


@dataclass(frozen=True)
class Pruned:
    case: Case
    model: nn.Module
    ks: dict[str, int]
    plan: td.PrunePlan
    small: nn.Module
    before: dict[str, object]
    after: dict[str, object]


@functools.lru_cache(maxsize=4)  # the tests of a case follow each other
def planned(name: str, case: Case) -> tuple[nn.Module, td.PrunePlan]:
    """A network of the zoo, and its plan for half of the features, which leaves it as it was."""
    torch.manual_seed(sum(map(ord, name)))
    model, ks, inputs = case.make(), case.ks("half"), case.inputs(2)
    before = snapshot(model)
    plan = td.plan_pruning(model, ks, inputs)
    assert_same(snapshot(model), before)
    return model, plan


@functools.lru_cache(maxsize=20)
def pruned(name: str, place: str, case: Case) -> Pruned:
    """What was made of a network of the zoo. For reading only."""
    model, half = planned(name, case)
    ks = case.ks(place)
    before = snapshot(model)
    plan = half if place == "half" else half.at(ks)
    small = plan.apply(model)
    return Pruned(case, model, ks, plan, small, before, snapshot(model))


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in tensors_by_name(model).items()}


# ------------------------------------------------------------------------------------ the promise


@each(*PLACES)
def test_the_small_network_computes_what_the_masked_one_does(p):
    for samples in (2, 5):
        assert_same_outputs(p.small, p.model, p.ks, *p.case.inputs(samples))


@each(*PLACES, where=lambda case, place: place != "none" or case.zero)
def test_exactly_these_weights_are_smaller(p):
    stated = p.case.shapes(*p.ks.values())
    whole, found = shapes(p.model), shapes(p.small)
    settled = {tensor for tensor in {**whole, **found, **stated} if stated.get(tensor, ()) != ANY}
    expected = {t: stated.get(t, whole.get(t)) for t in settled}
    assert {t: found.get(t) for t in settled} == expected


@each(*PLACES)
def test_the_original_is_bit_for_bit_untouched(p):
    assert_same(p.after, p.before)


@each(*PLACES)
def test_the_costs_are_those_of_the_small_network(p):
    for cost, model in ((p.plan.before, p.model), (p.plan.after, p.small)):
        assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert f"{p.plan.after.parameters:,}" in p.plan.summary()


@each("half")
def test_what_stays_is_named_with_a_reason(p):
    told = [f"{stay.name}: {stay.reason}".lower() for stay in p.plan.stays]
    assert all(stay.name and stay.reason for stay in p.plan.stays)
    for word in p.case.stays:
        assert any(word in line for line in told), told
    for stay in p.plan.stays:
        assert stay.name in p.plan.summary()
        assert stay.reason in p.plan.summary()


def goes_wholly(case, place):
    return not case.stays and ANY not in case.shapes(*case.n).values()


@each("half", where=goes_wholly)
def test_nothing_stays_where_everything_goes(p):
    assert list(p.plan.stays) == []


# ------------------------------------------------------------------- the small network afterwards


def keeps_a_prefix(case, place):
    return case.prefix


@each("all but one", where=keeps_a_prefix)
def test_prefixes_of_the_small_network_are_those_of_the_large_one(p):
    """A smaller k set afterwards: what is left of a layer still orders its features."""
    smaller = {layer: max(1, k - 2) for layer, k in p.ks.items()}
    inputs = p.case.inputs(3)
    expected = masked(p.model, smaller, *inputs)
    assert_close(masked(p.small, smaller, *inputs), expected, rtol=1e-9, atol=1e-10)


@each("all but one", where=keeps_a_prefix)
def test_a_small_network_can_be_pruned_again(p):
    smaller = {layer: max(1, k // 2) for layer, k in p.ks.items()}
    again = td.prune(p.small, smaller, p.case.inputs(2))
    assert_same_outputs(again, p.model, smaller, *p.case.inputs(5))
    at_once = p.plan.at(smaller).apply(p.model)
    assert shapes(again) == shapes(at_once)


@each("half")
def test_a_saved_network_comes_back_in_a_fresh_one(p, tmp_path):
    path = tmp_path / "small.safetensors"
    td.save_pruned(p.small, p.plan, path)
    loaded = td.load_pruned(p.case.make(), path).eval()
    assert_same(dict(loaded.state_dict()), dict(p.small.state_dict()))
    assert repr(loaded) == repr(copy.deepcopy(p.small).eval())
    inputs = p.case.inputs(3)
    with torch.no_grad():
        expected = copy.deepcopy(p.small)(*inputs)
        assert_close(loaded(*inputs), expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------ the case


@each("half")
def test_a_case_states_its_own_width(p):
    """The numbers that the shapes are worked out from are those of the model."""
    assert len(inspect.signature(p.case.shapes).parameters) in (1, len(p.case.n))
    model = copy.deepcopy(p.model)
    widths = {name: [] for name in td.tail_dropouts(model)}
    for name, layer in td.tail_dropouts(model).items():
        layer.register_forward_hook(functools.partial(note_width, widths[name]))
    model(*p.case.inputs(2))
    assert [set(seen) for seen in widths.values()] == [{n} for n in p.case.n]


def note_width(widths, layer, inputs, output):
    widths.append(output.shape[layer.dropout_dim])
