"""Pruned Hugging Face models are plain: they are saved, and loaded where this library is not."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.families import (
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    IMAGES_AND_SOUND,
    TEXT,
    TOKENS,
    N,
    a_text,
    clip,
    tokens,
)
from helpers.oracle import assert_same, snapshot
from torch import nn
from torch.testing import assert_close

import taildropout as td
from taildropout import PruningError, TailDropout
from taildropout.pruning import verify
from taildropout.pruning.configs import fit_configs

K = 8
WIDTH = K / N

# ------------------------------------------------------------------------------- saved and loaded

LOADING = """
import sys
from pathlib import Path

sys.modules["taildropout"] = None  # so that an import of it fails
import torch, transformers

for folder in map(Path, sys.argv[1:]):
    kind, inputs = torch.load(folder / "call.pt")
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.save(model(**inputs)[0], folder / "output.pt")
"""


def outputs_without_this_library(folders):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADING, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / "output.pt") for folder in folders]


@torch.no_grad()
def output_at(model, widths, inputs):
    with td.at_width(model, widths):
        return model(**inputs)[0]


def save(small, inputs, folder):
    small.save_pretrained(folder)
    torch.save((type(small).__name__, inputs), folder / "call.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "families",
    [DECODERS, ENCODER_DECODERS, ENCODERS, IMAGES_AND_SOUND],
    ids=["decoders", "encoders and decoders", "encoders", "images and sound"],
)
def test_what_is_saved_is_loaded_without_this_library(families, tmp_path):
    """In the default configuration, with its cache; and the config is that of a narrow model."""
    expected = {}
    for name, family in families.items():
        model, inputs = family.make(), family.arguments()
        random_state = torch.get_rng_state()
        small = td.prune(model, WIDTH, inputs)
        assert_same(torch.get_rng_state(), random_state)
        as_built = family.kind(family.config(K)).config
        assert as_data(small.config) == as_data(as_built), name
        expected[name] = output_at(model, WIDTH, inputs)
        save(small, inputs, tmp_path / name)
    found = outputs_without_this_library([tmp_path / name for name in families])
    assert_close(dict(zip(families, found, strict=True)), expected, rtol=1e-9, atol=1e-9)


def as_data(config):
    """A config as data."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


@pytest.mark.slow
def test_a_width_that_follows_from_another_is_written_out():
    """GPT-2 has n_inner = None for four times the width of its stream."""
    config = transformers.GPT2Config(vocab_size=9, n_positions=9, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    for i in range(2):
        td.insert(model, f"transformer.h.{i}.mlp.act", TailDropout())
    small = td.prune(model, 0.25, {"input_ids": torch.randint(9, (2, 5))})
    assert (model.config.n_inner, small.config.n_inner) == (None, 8)


# --------------------------------------------------------------------- configs of what was cut


def changed(config, **numbers):
    config = copy.deepcopy(config)
    for name, number in numbers.items():
        setattr(config, name, number)
    return config


def cut_to(kind, config, narrow):
    """A wide model, and a narrow one that still has the wide one's config."""
    model, small = kind(copy.deepcopy(config)), kind(copy.deepcopy(narrow))
    copies = {}
    for name, module in small.named_modules():
        if "config" in vars(module):
            module.config = copy.deepcopy(model.get_submodule(name).config, copies)
    return model, small


LLAMA = transformers.LlamaConfig(**TEXT, **TOKENS, intermediate_size=24, num_key_value_heads=2)
FUSED = transformers.Phi3Config(**TEXT, **TOKENS, intermediate_size=24, num_key_value_heads=2)
T5 = ENCODER_DECODERS["T5"].config(24)
RESNET = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 8], depths=[1, 1, 1])
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
STREAM = {"hidden_size": 6, "rms_norm_eps": 1e-6 * 6 / 16}

CUTS = {
    "heads": (transformers.LlamaForCausalLM, LLAMA, changed(LLAMA, **HEADS)),
    "the size of heads": (transformers.LlamaForCausalLM, LLAMA, changed(LLAMA, head_dim=2)),
    "a stream and the eps of its norms": (
        transformers.LlamaForCausalLM,
        LLAMA,
        changed(LLAMA, **STREAM),
    ),
    "all at once": (
        transformers.LlamaForCausalLM,
        LLAMA,
        changed(LLAMA, **HEADS, **STREAM, intermediate_size=9),
    ),
    "heads whose size was not written": (
        transformers.Phi3ForCausalLM,
        FUSED,
        changed(FUSED, **HEADS, head_dim=4),
    ),
    "heads, told from their size": (
        transformers.T5ForConditionalGeneration,
        T5,
        changed(T5, num_heads=2),
    ),
    "the size of heads, told from their number": (
        transformers.T5ForConditionalGeneration,
        T5,
        changed(T5, d_kv=2),
    ),
    "one entry of a list among equals": (
        transformers.ResNetModel,
        RESNET,
        changed(RESNET, hidden_sizes=[8, 12, 4]),
    ),
    "two towers": (transformers.CLIPModel, clip(24), clip(5, 7)),
    "one of two towers": (transformers.CLIPModel, clip(24), clip(24, 7)),
}


@pytest.mark.parametrize("name", CUTS)
def test_the_config_is_found_from_what_it_builds(name):
    kind, config, narrow = CUTS[name]
    model, small = cut_to(kind, config, narrow)
    before = as_data(model.config)
    fit_configs(small, model)
    assert as_data(small.config) == as_data(kind(copy.deepcopy(narrow)).config)
    assert as_data(model.config) == before
    assert "save_pretrained" not in vars(small)


def test_the_config_copies_of_encoder_and_decoder_agree_with_it():
    model, small = cut_to(transformers.T5ForConditionalGeneration, T5, changed(T5, d_ff=5))
    fit_configs(small, model)
    assert small.config.d_ff == small.encoder.config.d_ff == small.decoder.config.d_ff == 5
    assert small.shared.weight.shape == (50, 16)


def test_a_model_within_another_gets_its_config(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertModel(ENCODERS["BERT"].config(N))
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.bert(input_ids=x).pooler_output)

    model = Classifier().eval()
    for i in range(2):
        td.insert(model, f"bert.encoder.layer.{i}.intermediate", TailDropout())
    small = td.prune(model, WIDTH, tokens())
    assert (small.bert.config.intermediate_size, model.bert.config.intermediate_size) == (K, N)
    small.bert.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path).eval()
    x = tokens()
    assert_close(loaded(x).pooler_output, small.bert(x).pooler_output)


# ------------------------------------------------------------------------------------- refusals


FIRST, SECOND = (f"model.layers.{i}.mlp.act_fn.tail_dropout" for i in range(2))


def ragged():
    return td.prune(DECODERS["Llama"].make(), {FIRST: 5, SECOND: 7}, a_text())


def one_of_two():
    return td.prune(DECODERS["Llama"].make(), {FIRST: 5}, a_text())


def with_a_new_bias():
    """What a sigmoid makes of zeros becomes the bias of a Linear that had none."""
    config = changed(T5, feed_forward_proj="sigmoid", dense_act_fn="sigmoid")
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    for name in [n for n, _ in model.named_modules() if n.endswith(".wi")]:
        td.insert(model, name, TailDropout())
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(5)}
    return td.prune(model, WIDTH, inputs)


def mixtral():
    """Its experts are one operation that takes all weights at once, which stay."""
    config = transformers.MixtralConfig(
        **TEXT,
        **TOKENS,
        intermediate_size=12,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    for i in range(2):
        td.insert(model, f"model.layers.{i}.mlp", TailDropout())
    return td.prune(model, 0.5, a_text())


def written_in_the_code():
    """ConvNeXt's hidden features are four times those of the stage, by its code."""
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2
    )
    model = transformers.ConvNextModel(config).eval()
    for i in range(2):
        td.insert(model, f"encoder.stages.{i}.layers.0.act", TailDropout())
    return td.prune(model, 0.5, {"pixel_values": torch.randn(2, 3, 16, 16)})


def heads_that_derive_their_size():
    """By BERT's code a head has hidden_size / num_attention_heads features."""
    model = ENCODERS["BERT"].make()
    small = copy.deepcopy(model)
    for layer in small.bert.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(attention, name, nn.Linear(16, 8))
        attention.num_attention_heads, attention.all_head_size = 2, 8
        layer.attention.output.dense = nn.Linear(8, 16)
    fit_configs(small, model)
    return small


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own"

    def __init__(self, features=24, **options):
        super().__init__(**options)
        self.features = features


class Own(transformers.PreTrainedModel):
    """Divides by a width that it was built with, which is no width once it was cut."""

    config_class = OwnConfig
    reads_config = False

    def __init__(self, config):
        super().__init__(config)
        self.features = config.features
        self.hidden, self.out = nn.Linear(5, config.features), nn.Linear(config.features, 3)
        self.post_init()

    def forward(self, x):
        by = self.config.features if self.reads_config else self.features
        return self.out(self.hidden(x).relu() / by)


class OwnThatReads(Own):
    reads_config = True


def divides(kind):
    model = kind(OwnConfig()).eval()
    td.insert(model, "hidden", TailDropout())
    small = td.prune(model, 8, torch.randn(2, 5))
    assert small.config.features == 24
    return small


REFUSED = {
    "a width that divides": (lambda: divides(Own), "computes something else"),
    "a width that is read": (lambda: divides(OwnThatReads), "computes something else"),
    "ragged": (
        ragged,
        r"config\.intermediate_size is one number for sizes that are \[5, 7\] now: prune all of "
        r"them to one, such as 7\. Or save it with taildropout\.save_pruned",
    ),
    "one of two layers": (
        one_of_two,
        r"config\.intermediate_size is .* \[5, 24\] now: prune all of them to one, such as 5\.",
    ),
    "a new bias": (with_a_new_bias, r"one of them only has .*wo\.bias.*save_pruned"),
    "Mixtral": (mixtral, r"layers still slice .*: 'model\.layers\.0\.mlp\.tail_drop.*save_pruned"),
    "ConvNeXt": (written_in_the_code, r"no config was found that builds .*pwconv1.*save_pruned"),
    "BERT's heads": (heads_that_derive_their_size, r"hidden_size is one number .* \[8, 16\] now"),
}


SLOW = {"ragged", "one of two layers", "a new bias", "Mixtral"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else []) for n in REFUSED]
)
def test_what_no_config_builds_is_not_saved(name, tmp_path):
    make, words = REFUSED[name]
    small = make()
    for one in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with pytest.raises(PruningError, match=words):
            one.save_pretrained(tmp_path / "small")
    for part in small.modules():
        if isinstance(part, transformers.PreTrainedModel):
            with pytest.raises(PruningError, match=words):
                part.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_what_is_refused_is_saved_by_save_pruned(tmp_path):
    model, inputs = DECODERS["Llama"].make(), a_text()
    plan = td.plan_pruning(model, {FIRST: 5, SECOND: 7}, inputs)
    small = plan.apply(model)
    td.save_pruned(small, plan, tmp_path / "small.safetensors")
    loaded = td.load_pruned(DECODERS["Llama"].make(), tmp_path / "small.safetensors")
    assert_close(loaded(**inputs)[0], small(**inputs)[0], rtol=0, atol=0)
    with pytest.raises(PruningError, match=r"sizes that are \[5, 7\] now"):
        loaded.save_pretrained(tmp_path)


@pytest.mark.slow
def test_pruned_further_to_one_width_it_is_saved(tmp_path):
    model, inputs = DECODERS["Llama"].make(), a_text()
    small = td.prune(td.prune(model, {FIRST: 5, SECOND: 7}, inputs), {FIRST: 4, SECOND: 4}, inputs)
    small.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.intermediate_size == 4
    expected = output_at(model, {FIRST: 4, SECOND: 4}, inputs)
    assert_close(loaded.eval()(**inputs)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_cut_that_takes_nothing_keeps_the_refusal(tmp_path):
    small = ragged()
    again = td.prune(small, {FIRST: 5, SECOND: 7}, a_text())
    with pytest.raises(PruningError, match=r"sizes that are \[5, 7\] now"):
        again.save_pretrained(tmp_path)


# --------------------------------------------------------------------- the user's own config


def configs(model):
    """All that a model holds beside its tensors and modules, as data, and which objects these are."""
    held = {
        name: module.config for name, module in model.named_modules() if "config" in vars(module)
    }
    return {
        "tensors": snapshot(model),
        "configs": {name: as_data(config) for name, config in held.items()},
        "identities": {name: id(config) for name, config in held.items()},
        "generation": model.generation_config.to_dict(),
        "attributes": sorted(vars(model)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_the_models_own_config_is_as_before(name, monkeypatch):
    family = (DECODERS | ENCODER_DECODERS)[name]
    model, inputs = family.make(), family.arguments()
    assert model.config.use_cache is True
    before = configs(model)
    plan = td.plan_pruning(model, WIDTH, inputs)
    assert_same(configs(model), before)
    small = plan.apply(model)
    assert_same(configs(model), before)
    assert small.config.use_cache is True
    assert small(**inputs).past_key_values is not None

    with pytest.raises(PruningError, match="must run on its example inputs"):
        td.prune(model, WIDTH, {**inputs, "input_ids": torch.ones(2, 7)})
    assert_same(configs(model), before)

    monkeypatch.setitem(verify.TOLERANCE, torch.float64, -1)
    with pytest.raises(PruningError, match="differs by up to"):
        plan.apply(model)
    assert_same(configs(model), before)


@pytest.mark.slow
def test_the_small_model_generates_what_the_large_one_does():
    """With the cache, which neither of them has lost."""
    family = DECODERS["Llama"]
    model, inputs = family.make(), family.arguments()
    small = td.prune(model, WIDTH, inputs)
    options = {"max_new_tokens": 5, "do_sample": False}
    with td.at_width(model, WIDTH):
        expected = model.generate(**inputs, **options)
    assert_close(small.generate(**inputs, **options), expected)


@pytest.mark.slow
def test_loading_leaves_the_callers_config_alone(tmp_path):
    family, inputs = DECODERS["Llama"], a_text()
    model = family.make()
    plan = td.plan_pruning(model, WIDTH, inputs)
    small = plan.apply(model)
    td.save_pruned(small, plan, tmp_path / "small.safetensors")
    shell = family.make()
    config, before = shell.config, as_data(shell.config)
    loaded = td.load_pruned(shell, tmp_path / "small.safetensors")
    assert as_data(config) == before
    assert loaded is shell
    assert loaded.config.intermediate_size == K
    loaded.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(plain(**inputs)[0], small(**inputs)[0], rtol=1e-9, atol=1e-9)
