"""The residual stream of whole transformers cut at one k, and heads cut at output projections."""

import copy
from fnmatch import fnmatch
from itertools import pairwise

import pytest
import torch
import transformers
from helpers.oracle import assert_computes
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import taildropout as td
from taildropout import TailDropout
from taildropout.models.copies import tensors_by_name
from taildropout.pruning.precision import InFloat64

N, K, WORDS = 16, 6, 31
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": N,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # so that no other size is that of the stream
    "max_position_embeddings": 64,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXAMPLE, OTHERS = (2, 5), [(1, 1), (3, 7), (5, 20)]


class Logits(nn.Module):
    """A model of transformers, of which only the logits are asked for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs, use_cache=False).logits


def prepared(model):
    """Random weights, none of them at its initial 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return Logits(model).eval()


def insert(model, *patterns):
    for name, _ in list(model.named_modules()):
        if any(fnmatch(name, pattern) for pattern in patterns):
            td.insert(model, name, TailDropout())
    return model


def tokens(batch, time, decoder=False):
    inputs = {"input_ids": torch.randint(WORDS, (batch, time))}
    inputs["attention_mask"] = torch.ones(batch, time, dtype=torch.int64)
    if decoder:
        inputs["decoder_input_ids"] = torch.randint(WORDS, (batch, time + 1))
    return inputs


@torch.no_grad()
def assert_equal_at_all_sizes(plan, model, ks, inputs):
    """In float64: the network that the plan makes, and the large one at these ks."""
    large = copy.deepcopy(model).double().eval()
    small = plan.apply(large)
    for size in (EXAMPLE, *OTHERS):
        x = inputs(*size)
        with InFloat64(), td.at_width(large, ks):
            assert_close(small(**x), large(**x), rtol=1e-9, atol=1e-9)


def shapes(model):
    return {name: tuple(t.shape) for name, t in tensors_by_name(model).items()}


# ------------------------------------------------------------------------------------ the stream

WRITERS = ("*.embed_tokens", "*.o_proj", "*.down_proj")


def causal(name, **more):
    def build(layers=1):
        sizes = {**SIZES, "num_hidden_layers": layers}
        config = getattr(transformers, f"{name}Config")(**sizes, **more)
        return insert(prepared(getattr(transformers, f"{name}ForCausalLM")(config)), *WRITERS)

    return build


def t5(**more):
    def build(layers=1):
        config = transformers.T5Config(
            vocab_size=WORDS,
            d_model=N,
            d_kv=6,
            d_ff=24,
            num_layers=layers,
            num_heads=4,
            use_cache=False,
            **more,
        )
        model = prepared(transformers.T5ForConditionalGeneration(config))
        return insert(model, "*.embed_tokens", "*Attention.o", "*.wo")

    return build


STREAMS = {
    "Llama": causal("Llama"),
    "Llama, eager": causal("Llama", attn_implementation="eager"),
    "Llama, tied": causal("Llama", tie_word_embeddings=True),
    "Mistral": causal("Mistral"),
    "Qwen2": causal("Qwen2"),
    "Qwen3": causal("Qwen3"),
    "Gemma": causal("Gemma"),
    "Gemma2": causal("Gemma2"),
    "Phi3": causal("Phi3"),
    "OLMo2": causal("Olmo2"),
    "T5": t5(),
    "T5, gated": t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


def pruned_stream(name, k=K, example=EXAMPLE, layers=1):
    model = STREAMS[name](layers)
    ks = dict.fromkeys(td.tail_dropouts(model), k)

    def inputs(*size):
        return tokens(*size, decoder=name.startswith("T5"))

    return model, ks, inputs, td.plan_pruning(model, ks, inputs(*example))


ALWAYS = ("Llama", "Qwen3", "Gemma", "T5")
SLOW = [
    pytest.param(name, marks=[pytest.mark.slow, *([] if name in ALWAYS else [pytest.mark.long])])
    for name in STREAMS
]


@pytest.mark.parametrize("name", SLOW)
def test_nothing_of_the_stream_is_left_at_n(name):
    model, ks, inputs, plan = pruned_stream(name, layers=2)
    assert plan.stays == []
    expected = {
        tensor: tuple(K if size == N else size for size in shape)
        for tensor, shape in shapes(model).items()
    }
    assert shapes(plan.apply(model)) == expected
    assert_equal_at_all_sizes(plan, model, ks, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("Llama", (1, 1)),
        ("Llama", (2, 1)),
        ("Llama", (1, 5)),
        ("T5", (1, 1)),
        pytest.param("T5", (2, 1), marks=pytest.mark.long),
        pytest.param("T5", (1, 5), marks=pytest.mark.long),
    ],
)
def test_whatever_the_size_of_the_example(name, example):
    model, ks, inputs, plan = pruned_stream(name, example=example)
    assert plan.stays == []
    assert_equal_at_all_sizes(plan, model, ks, inputs)


@pytest.mark.slow
def test_fewer_features_never_mean_more_parameters_or_flops():
    *_, plan = pruned_stream("Llama")
    costs = [plan.at(dict.fromkeys(plan.k, k), check=False).after for k in range(N + 1)]
    assert costs[K] == plan.after
    for fewer, more in pairwise(costs):
        assert fewer.parameters <= more.parameters
        assert fewer.flops <= more.flops
    assert costs[-1] == plan.before


def test_the_small_network_is_a_plain_one_of_its_class():
    """With another hidden size and eps, and the size of the heads written out."""
    k = 8  # transformers wants a multiple of the number of heads, whatever their size is
    model, ks, inputs, plan = pruned_stream("Llama", k)
    small = plan.apply(model)
    eps = model.model.config.rms_norm_eps * N / k
    sizes = {**SIZES, "hidden_size": k, "rms_norm_eps": eps}
    plain = Logits(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))).eval()
    plain.load_state_dict(small.state_dict())
    x = inputs(3, 7)
    with torch.no_grad(), td.at_width(model, ks):
        assert_close(plain(**x), small(**x), rtol=0, atol=0)
        assert_close(plain(**x), model(**x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma", pytest.param("Llama, tied", marks=pytest.mark.long)])
def test_a_tied_head_loses_the_same_columns_and_stays_tied(name):
    model, *_, plan = pruned_stream(name)
    small = plan.apply(model)
    assert small.model.lm_head.weight is small.model.model.embed_tokens.weight


@pytest.mark.slow
def test_another_k_in_one_place_keeps_what_the_others_keep():
    """The stream has the features of its widest writer."""
    model = STREAMS["Llama"]()
    ks = dict.fromkeys(td.tail_dropouts(model), K)
    ks["model.model.layers.0.self_attn.o_proj.tail_dropout"] = 9
    plan = td.plan_pruning(model, ks, tokens(*EXAMPLE))
    assert plan.apply(model).model.model.norm.weight.shape == (9,)
    assert_equal_at_all_sizes(plan, model, ks, tokens)


@pytest.mark.slow
def test_a_writer_without_a_layer_keeps_the_stream():
    model = insert(
        prepared(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))), "*.embed_tokens"
    )
    ks = dict.fromkeys(td.tail_dropouts(model), K)
    plan = td.plan_pruning(model, ks, tokens(*EXAMPLE))
    assert plan.rescales == []
    assert plan.stays
    assert all("reads them" in stay.reason for stay in plan.stays)
    assert_equal_at_all_sizes(plan, model, ks, tokens)


@pytest.mark.slow
def test_the_stream_of_a_mixture_of_experts():
    """Its kernel takes multiples of 16 bytes, so some of the zeros stay; and it has no float64."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    model = insert(
        prepared(transformers.MixtralForCausalLM(config)), "*.embed_tokens", "*.o_proj", "*.mlp"
    )
    read = td.plan_pruning(model, dict.fromkeys(td.tail_dropouts(model), 8), tokens(*EXAMPLE))
    for k, width in [(8, 8), (6, 8), (3, 4)]:
        ks = dict.fromkeys(read.k, k)
        plan = read.at(ks)
        small = plan.apply(model)
        layer = small.model.model.layers[0]
        assert layer.mlp.experts.gate_up_proj.shape == (4, 48, width)
        assert layer.mlp.experts.down_proj.shape == (4, width, 24)
        assert layer.mlp.gate.weight.shape == (4, width)
        assert layer.self_attn.q_proj.weight.shape == (24, width)
        assert all("on multiples of 4 features only" in stay.reason for stay in plan.stays)
        for size in (EXAMPLE, *OTHERS):
            x = tokens(*size)
            with torch.no_grad(), td.at_width(model, ks):
                assert_close(small(**x), model(**x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_stream_of_a_state_space_model():
    config = transformers.MambaConfig(
        vocab_size=WORDS, hidden_size=N, state_size=4, num_hidden_layers=1, use_cache=False
    )
    model = insert(
        prepared(transformers.MambaForCausalLM(config)), "*.embeddings", "*.mixer.out_proj"
    )
    ks = dict.fromkeys(td.tail_dropouts(model), K)

    def inputs(*size):
        return {"input_ids": tokens(*size)["input_ids"]}

    plan = td.plan_pruning(model, ks, inputs(*EXAMPLE))
    assert plan.stays == []
    assert plan.apply(model).model.backbone.layers[0].mixer.in_proj.weight.shape == (64, K)
    assert_equal_at_all_sizes(plan, model, ks, inputs)


# --------------------------------------------------------------------------------------- the heads


class Tailed(nn.Module):
    """An output projection with a TailDropout at its input."""

    def __init__(self, projection):
        super().__init__()
        self.tail = TailDropout()
        self.projection = projection

    def forward(self, x):
        return self.projection(self.tail(x))


def tailed(model, pattern):
    for name, module in list(model.named_modules()):
        if fnmatch(name, pattern):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, Tailed(module))
    return model


def grouped(name, **more):
    """Four heads of 6, two for each of keys and values."""

    def build():
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        return tailed(prepared(getattr(transformers, f"{name}ForCausalLM")(config)), "*.o_proj")

    return build


def alike(name, head, pattern, **sizes):
    """Four heads of 4, each with keys and values of its own."""

    def build():
        config = getattr(transformers, f"{name}Config")(**sizes)
        return tailed(prepared(getattr(transformers, f"{name}{head}")(config)), pattern)

    return build


BERT = {
    "vocab_size": WORDS,
    "hidden_size": N,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NEOX = {**BERT, "intermediate_size": 24, "use_cache": False}
GPT2 = {"vocab_size": WORDS, "n_positions": 64, "n_embd": N, "n_layer": 1, "n_head": 4}
OPT = {**BERT, "ffn_dim": 24, "word_embed_proj_dim": N, "use_cache": False}
T5 = {"vocab_size": WORDS, "d_model": N, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
BERT_OUTPUT = "*.attention.output.dense"

# The model, k (of 24 or 16), and the shapes of what computes queries, keys and values, if cut.
HEADS = {
    "Llama": (grouped("Llama"), 12, {"q_proj": (12, N), "k_proj": (6, N), "v_proj": (6, N)}),
    "Llama, eager": (
        grouped("Llama", attn_implementation="eager"),
        12,
        {"q_proj": (12, N), "k_proj": (6, N), "v_proj": (6, N)},
    ),
    "Mistral": (grouped("Mistral"), 12, {"q_proj": (12, N), "k_proj": (6, N), "v_proj": (6, N)}),
    "Qwen3": (grouped("Qwen3"), 12, {"q_proj": (12, N), "k_proj": (6, N), "v_proj": (6, N)}),
    "Gemma": (grouped("Gemma"), 12, {"q_proj": (12, N), "k_proj": (6, N), "v_proj": (6, N)}),
    "BERT": (
        alike("Bert", "LMHeadModel", BERT_OUTPUT, **BERT, intermediate_size=24, is_decoder=True),
        8,
        {"query": (8, N), "key": (8, N), "value": (8, N)},
    ),
    "BERT, eager": (
        alike(
            *("Bert", "LMHeadModel", BERT_OUTPUT),
            **BERT,
            intermediate_size=24,
            is_decoder=True,
            attn_implementation="eager",
        ),
        12,
        {"query": (12, N), "key": (12, N), "value": (12, N)},
    ),
    "OPT": (
        alike("OPT", "ForCausalLM", "*.out_proj", **OPT),
        4,
        {"q_proj": (4, N), "k_proj": (4, N), "v_proj": (4, N)},
    ),
    "GPT-2, fused": (
        alike("GPT2", "LMHeadModel", "*.attn.c_proj", **GPT2),
        8,
        {"c_attn": (N, 24)},
    ),
    "GPT-NeoX, fused": (
        alike("GPTNeoX", "ForCausalLM", "*.attention.dense", **NEOX),
        8,
        {"query_key_value": (24, N)},
    ),
    "T5": (
        alike("T5", "ForConditionalGeneration", "*Attention.o", **T5),
        8,
        {"Attention.q": (8, N), "Attention.k": (8, N), "Attention.v": (8, N)},
    ),
    # Its slices go by sizes from the config: they stay.
    "Phi3, fused": (grouped("Phi3"), 12, {"qkv_proj": (48, N)}),
}


# Their attention is computed as Llama's is.
LIKE_LLAMA = ("Mistral", "Gemma", "OPT")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in LIKE_LLAMA else pytest.mark.slow)
        for name in HEADS
    ],
)
def test_heads_go_with_what_computes_them(name):
    build, k, expected = HEADS[name]
    model = build()
    ks = dict.fromkeys(td.tail_dropouts(model), k)

    def inputs(*size):
        return tokens(*size, decoder=name == "T5")

    plan = td.plan_pruning(model, ks, inputs(*EXAMPLE))
    small = plan.apply(model)
    found = {}
    for tensor, shape in shapes(small).items():
        for part in expected:
            if tensor.endswith(f"{part}.weight"):
                found.setdefault(part, set()).add(shape)
        if tensor.endswith("projection.weight"):
            assert k in shape
    assert found == {part: {shape} for part, shape in expected.items()}
    assert_equal_at_all_sizes(plan, model, ks, inputs)


class Attention(nn.Module):
    """As vision transformers have it: one Linear for queries, keys and values."""

    def __init__(self, part, dim=N, heads=4):
        super().__init__()
        self.part, self.num_heads, self.head_dim = part, heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = Tailed(nn.Linear(dim, dim))

    def forward(self, x):
        q, k, v = self.part(self, self.qkv(x))
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(h)


def reshaped(m, h):
    b, t, _ = h.shape
    return h.reshape(b, t, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def reshaped_to_what_fits(m, h):
    return h.unflatten(-1, (3, -1, m.head_dim)).permute(2, 0, 3, 1, 4)


def chunked(m, h):
    return [part.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for part in h.chunk(3, -1)]


def split(m, h):
    parts = h.split(m.num_heads * m.head_dim, -1)
    return [part.unflatten(-1, (m.num_heads, m.head_dim)).transpose(1, 2) for part in parts]


def written_out(m, h):
    parts = h[..., :16], h[..., 16:32], h[..., 32:]
    return [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in parts]


@pytest.mark.parametrize("part", [reshaped, reshaped_to_what_fits, chunked, split, written_out])
@pytest.mark.parametrize("k", [4, 12, 16])
def test_fused_queries_keys_and_values_are_cut_alike_or_stay(part, k):
    model = nn.Sequential(Attention(part)).double()
    plan = td.plan_pruning(model, k, torch.randn(2, 5, N, dtype=torch.float64))
    small = plan.apply(model)
    stays = part is written_out
    assert small[0].qkv.weight.shape == (48 if stays else 3 * k, N)
    assert small[0].proj.projection.weight.shape == (N, k)
    assert_computes(small, model, {"0.proj.tail": k}, (3, 7, N), (1, 1, N))


def test_part_of_a_head_keeps_all_of_it():
    """Its queries and keys are needed, and so are the values in front of the layer."""
    model = nn.Sequential(Attention(chunked)).double()
    small = td.prune(model, 6, torch.randn(2, 5, N, dtype=torch.float64))
    assert small[0].qkv.weight.shape == (24, N)
    assert_computes(small, model, {"0.proj.tail": 6}, (3, 7, N), (1, 1, N))


@pytest.mark.slow
def test_a_fused_gate_is_cut_with_what_it_gates():
    model = prepared(transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES)))
    tailed(model, "*.down_proj")
    ks = dict.fromkeys(td.tail_dropouts(model), 10)
    plan = td.plan_pruning(model, ks, tokens(*EXAMPLE))
    assert plan.stays == []
    assert plan.apply(model).model.model.layers[0].mlp.gate_up_proj.weight.shape == (20, N)
    assert_equal_at_all_sizes(plan, model, ks, tokens)
