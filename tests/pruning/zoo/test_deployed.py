"""A small network compiles, exports, and runs in onnxruntime."""

import copy
import io

import onnxruntime
import pytest
import torch
from helpers.oracle import masked
from helpers.zoo import (
    branches,
    convolutional_networks,
    norms,
    other_networks,
    transformer_networks,
)
from helpers.zoo.checks import pruned
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.slow

FAMILIES = [branches, convolutional_networks, norms, other_networks, transformer_networks]
CASES = {name: case for family in FAMILIES for name, case in family.CASES.items()}

# Both sides cut, the consumer only, the producer only, constants folded, heads.
DEPLOYED = [
    "U-Net",
    "ResNet",
    "LayerNorm before",
    "residual branch",
    "concatenation of constants",
    "attention",
]


@pytest.mark.parametrize("name", DEPLOYED)
def test_the_small_network_compiles(name, fresh_compiler):
    p = pruned(name, "half", CASES[name])
    inputs = p.case.inputs(3)
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(p.small), fullgraph=True, backend="aot_eager")
        assert_close(compiled(*inputs), masked(p.model, p.ks, *inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", DEPLOYED)
def test_the_small_network_exports(name):
    p = pruned(name, "half", CASES[name])
    program = torch.export.export(copy.deepcopy(p.small), p.case.inputs(3), strict=False)
    inputs = p.case.inputs(3)
    actual = program.module()(*inputs)
    assert_close(actual, masked(p.model, p.ks, *inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["U-Net", "residual branch", "concatenation of constants", "BERT"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_small_network_runs_in_onnxruntime(name):
    p = pruned(name, "half", CASES[name])
    small = copy.deepcopy(p.small).float()
    inputs = tuple(t.float() if t.is_floating_point() else t for t in p.case.inputs(3))
    file = io.BytesIO()
    torch.onnx.export(small, inputs, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    actual = [torch.from_numpy(array) for array in session.run(None, feed)]
    expected = tree_leaves(masked(copy.deepcopy(p.model).float(), p.ks, *inputs))
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
