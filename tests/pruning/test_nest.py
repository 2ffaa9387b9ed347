"""Where a width can be chosen in real architectures, and what a nested one is pruned to."""

import pytest
from helpers.architectures import ARCHITECTURES
from helpers.oracle import assert_same, snapshot

import taildropout as td

FAST = ("MLP", "LSTM tagger", "ConvNeXt")
NAMES = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ARCHITECTURES
]


@pytest.mark.parametrize("name", NAMES)
def test_the_places_of_an_architecture(name):
    architecture = ARCHITECTURES[name]
    model = architecture.make()
    example = architecture.inputs(*architecture.sizes[0])
    before = snapshot(model)
    places = td.places(model, example, streams=architecture.streams)
    assert [(p.name, p.at, p.n, p.multiple_of, p.kind) for p in places] == architecture.places
    several = {p.name: len(p.positions) for p in places if len(p.positions) > 1}
    assert several == architecture.positions
    for place, words in architecture.reasons.items():
        assert words in places.others[place]
    assert_same(snapshot(model), before)
