"""What a pruned network is compared with: the whole network with k set, in float64."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import taildropout as td
from taildropout.models.copies import without_cache


@torch.no_grad()
def masked(model, ks, *inputs):
    """The output of the whole model in eval mode with the ks set: `{layer name: k}`."""
    model = without_cache(copy.deepcopy(model)).eval()
    for name, k in ks.items():
        td.tail_dropouts(model)[name].set_k(k)
    return model(*inputs)


@torch.no_grad()
def assert_computes(small, model, ks, *shapes):
    """`small` equals the masked `model`, both of float64, on inputs that are new to both."""
    small = copy.deepcopy(small).eval()
    for shape in shapes:
        inputs = 2 * torch.randn(shape, dtype=torch.float64)
        assert_close(small(inputs.clone()), masked(model, ks, inputs), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def assert_same_outputs(small, model, ks, *inputs):
    """`small` in eval mode equals the masked `model`, to the rounding of float64."""
    actual = without_cache(copy.deepcopy(small)).eval()(*copy.deepcopy(inputs))
    assert_close(actual, masked(model, ks, *inputs), rtol=1e-9, atol=1e-10)


def assert_prunes(model, k, *shapes):
    """Prune on inputs of the first shape, compare on new ones of all shapes; the small network.

    k is an int for a model with one layer, or `{layer name: k}`.
    """
    model.double()
    small = td.prune(model, k, torch.randn(shapes[0], dtype=torch.float64))
    ks = k if isinstance(k, dict) else dict.fromkeys(td.tail_dropouts(model), k)
    assert_computes(small, model, ks, *shapes)
    return small


@torch.no_grad()
def as_trained(model):
    """The model with random parameters and BatchNorm statistics: none is at its initial 0 or 1."""
    for parameter in model.parameters():
        parameter.normal_()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def snapshot(model):
    """All that must not change when a model is pruned, as plain data and clones."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "repr": repr(model),
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "identity": {name: (id(t), t.data_ptr(), t._version) for name, t in tensors.items()},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "grad": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        "training": {name: m.training for name, m in model.named_modules()},
        "k": {name: layer.k for name, layer in td.tail_dropouts(model).items()},
        "hooks": {n: [*m._forward_hooks, *m._forward_pre_hooks] for n, m in model.named_modules()},
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
    }


def assert_same(actual, expected):
    """Nested plain data and tensors, bit for bit."""
    assert tree_map_only(torch.Tensor, bits, actual) == tree_map_only(torch.Tensor, bits, expected)


def bits(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    data = flat.view(torch.uint8).tolist()
    return {"dtype": tensor.dtype, "shape": tuple(tensor.shape), "bits": data}


def chain(n, *behind, before=(), bias=True):
    """Linear(5, n), the modules `before`, the layer, the modules `behind`, Linear(n, 3)."""
    first, last = nn.Linear(5, n, bias=bias), nn.Linear(n, 3, bias=bias)
    return nn.Sequential(first, *before, td.TailDropout(), *behind, last)


def two_layers():
    return nn.Sequential(
        nn.Linear(5, 4),
        td.TailDropout(),
        nn.Linear(4, 6),
        nn.Sequential(td.TailDropout(), nn.Linear(6, 2)),
    )


def convs(*behind, before=(), d=2, first=None, last=None):
    """Conv(2, 4), the modules `before`, the layer, the modules `behind`, Conv(4, 3)."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    return nn.Sequential(
        conv(2, 4, 3, **(first or {})),
        *before,
        td.TailDropout(dropout_dim=1),
        *behind,
        conv(4, 3, **{"kernel_size": 2, **(last or {})}),
    )


class Net(nn.Module):
    """A model whose forward is a function of the module and the input."""

    def __init__(self, forward, n=4, inputs=5):
        super().__init__()
        self.function = forward
        self.producer = nn.Linear(inputs, n)
        self.tail = td.TailDropout()
        self.consumer = nn.Linear(n, 3)
        self.scale = nn.Parameter(torch.randn(n))
        self.shift = nn.Parameter(torch.randn(1, n))
        self.register_buffer("mean", torch.randn(n), persistent=False)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.gate = nn.Linear(inputs, 1)
        self.other = nn.Linear(inputs, n, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.function(self, x)


class LeNet(nn.Module):
    """Everything together: three layers, own parameters, pooling, flatten."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.tail1 = td.TailDropout(dropout_dim=1)
        self.pool = nn.MaxPool2d(2, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.tail2 = td.TailDropout(dropout_dim=1)
        self.fc1 = nn.Linear(3 * 16, 5)
        self.tail3 = td.TailDropout()
        self.scale = nn.Parameter(torch.randn(5))
        self.fc2 = nn.Linear(5, 2)

    def forward(self, x):
        x = self.tail1(self.act(self.norm1(self.conv1(x))))
        x = self.tail2(self.conv2(self.pool(x)).sigmoid())
        x = self.fc1((x.tanh() + 0.5).flatten(1)) * self.scale + 1
        return self.fc2(self.tail3(x * x.sigmoid()) * self.scale)
