"""Whose loop it is does not matter: inside the layers, each framework runs the width that was said.

Each loop is run by the real package, imported in its test. The width is read back from what the layers return: at a
width in its evaluation, and one width per sample in its training.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import taildropout as td
from taildropout import TailDropout, at_width, draw_together, tail_dropouts

pytestmark = pytest.mark.slow

WIDTH, SAMPLES, BATCH = 0.25, 24, 8


class Seen:
    """The k of every sample in every call of every layer, read off what the layer returns.

    It is that of the last feature that is not zero; no feature in these networks is zero by itself.
    """

    def __init__(self, model):
        self.calls = []
        for name, layer in tail_dropouts(model).items():
            layer.register_forward_hook(lambda m, _, y, name=name: self.look(name, m.training, y))

    def look(self, name, training, output):
        kept = (output.detach() != 0).flatten(1, -2).any(1) if output.ndim > 2 else output != 0
        n = kept.shape[-1]
        self.calls.append((name, training, (kept * torch.arange(1, n + 1)).amax(-1), n))

    def assert_all_at(self, width):
        """In eval, every call of every layer."""
        calls = [(k, n) for _, training, k, n in self.calls if not training]
        assert calls
        for k, n in calls:
            assert k.tolist() == [int(width * n)] * len(k)

    def assert_of_one_width(self, passes):
        """In training: so many passes, each of which gave its samples one width in all layers."""
        calls = [(name, k) for name, training, k, _ in self.calls if training]
        names = {name for name, _ in calls}
        assert len(names) > 1
        assert len(calls) == passes * len(names)
        for start in range(0, len(calls), len(names)):
            of_the_pass = calls[start : start + len(names)]
            assert {name for name, _ in of_the_pass} == names
            signs = [(k[:, None] - k).sign() for _, k in of_the_pass]
            assert all(bool((one * other >= 0).all()) for one in signs for other in signs)
            assert max(len(k.unique()) for _, k in of_the_pass) > 1


def network():
    return nn.Sequential(
        *(nn.Linear(4, 16), TailDropout(lengths=td.lengths.Uniform()), nn.Tanh()),
        *(nn.Linear(16, 32), TailDropout(lengths=td.lengths.Uniform()), nn.Linear(32, 3)),
    )


def data():
    return TensorDataset(torch.randn(SAMPLES, 4), torch.randint(3, (SAMPLES,)))


# --- a loop written by hand, as timm has it -------------------------------------------------------


def train_one_epoch(model, loader, optimizer, *, accumulate=1, autocast=False):
    model.train()
    for step, (inputs, target) in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(inputs), target)
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def validate(model, loader):
    model.eval()
    return sum((model(inputs).argmax(1) == target).sum().item() for inputs, target in loader)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loop_by_hand(accumulate, autocast):
    model = network()
    seen = Seen(model)
    draw_together(model)
    loader = DataLoader(data(), BATCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train_one_epoch(model, loader, optimizer, accumulate=accumulate, autocast=autocast)
    seen.assert_of_one_width(passes=3)
    with at_width(model, WIDTH):
        validate(model, loader)
    seen.assert_all_at(WIDTH)


# --- Hugging Face -------------------------------------------------------------------------------


quiet = pytest.mark.filterwarnings(  # what the packages say of each other, and of torch
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def bert():
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    layer = TailDropout(lengths=td.lengths.Uniform())
    assert len(td.insert_each(model, "*.intermediate", layer)) == 2
    return model


def gpt2():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    layer = TailDropout(lengths=td.lengths.Uniform())
    assert len(td.insert_each(model, "*.mlp.act", layer)) == 2
    return model


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        ids = torch.arange(i, i + 6) % 48 + 1
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": i % 3}


def trainer(model, folder, **options):
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=Sentences(), eval_dataset=Sentences()
    )


@quiet
@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 2),
        ({"gradient_accumulation_steps": 2, "bf16": True}, 3),
        ({"gradient_checkpointing": True}, 2),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
                "max_grad_norm": 0.0,
            },
            2,
        ),
    ],
)
def test_trainer(tmp_path, options, passes):
    model = bert()
    handle = draw_together(model)
    seen = Seen(model)
    loop = trainer(model, tmp_path, **options)
    loop.train()
    recomputed = 2 if "gradient_checkpointing" in options else 1
    assert len(seen.calls) == recomputed * passes * 2
    seen.calls = without_recomputations(seen.calls, passes, recomputed)
    seen.assert_of_one_width(passes)
    assert handle.drawn_u.shape == (BATCH,)
    with at_width(model, WIDTH):
        loop.evaluate()
        loop.predict(Sentences())
    seen.assert_all_at(WIDTH)


def without_recomputations(calls, passes, times):
    """Backward goes from the last layer to the first, and each has the k that it had."""
    kept = []
    for start in range(0, len(calls), 2 * times):
        forward, again = calls[start : start + 2], calls[start + 2 : start + 2 * times]
        if times == 2:
            for (name, _, k, _), (same, _, k_again, _) in zip(forward, again[::-1], strict=True):
                assert name == same
                assert_close(k, k_again)
        kept += forward
    assert len(kept) == passes * 2
    return kept


@quiet
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_and_trainer(tmp_path, checkpointing):
    import peft

    model = peft.get_peft_model(
        bert(), peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    handle = draw_together(model)
    assert next(iter(handle.layers)).startswith("base_model.model.bert")
    seen = Seen(model)
    loop = trainer(model, tmp_path, gradient_checkpointing=checkpointing)
    loop.train()
    seen.calls = without_recomputations(seen.calls, 2, 2 if checkpointing else 1)
    seen.assert_of_one_width(passes=2)
    with at_width(model, WIDTH):
        loop.evaluate()
    seen.assert_all_at(WIDTH)


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps what the first one in a process was made for."""
    from accelerate.state import AcceleratorState, GradientState

    yield AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@quiet
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("prepared_before", [True, False])
def test_accelerate(prepared_before):
    import accelerate

    model, loader = network(), DataLoader(data(), BATCH)
    seen = Seen(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if not prepared_before:
        draw_together(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if prepared_before:
        draw_together(model)
    model.train()
    for inputs, target in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), target))
            optimizer.step()
            optimizer.zero_grad()
    seen.assert_of_one_width(passes=3)
    with at_width(model, WIDTH):
        validate(model, loader)
    seen.assert_all_at(WIDTH)


@quiet
def test_generate_with_a_cache():
    model = gpt2().eval()
    draw_together(model)
    seen = Seen(model)
    prompt = torch.randint(50, (3, 4))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    state = torch.get_rng_state()
    with at_width(model, WIDTH):
        tokens = model.generate(prompt, use_cache=True, **options)
        assert_close(model.generate(prompt, use_cache=False, **options), tokens)
    assert tokens.shape == (3, 9)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen.calls) == 2 * (5 + 5)
    seen.assert_all_at(WIDTH)


@quiet
def test_a_language_model_trains_with_one_width_per_sequence():
    model = gpt2()
    draw_together(model)
    seen = Seen(model)
    for _ in range(2):
        ids = torch.randint(50, (BATCH, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        model(inputs_embeds=torch.randn(BATCH, 6, 16)).logits.sum().backward()
    seen.assert_of_one_width(passes=4)


def tokenizer():
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


@quiet
def test_a_pipeline():
    import transformers

    model = bert().eval()
    draw_together(model)
    seen = Seen(model)
    classify = transformers.pipeline(
        "text-classification", model=model, tokenizer=tokenizer(), device="cpu"
    )
    with at_width(model, WIDTH):
        answers = classify(["a b c", "d e"], batch_size=2)
    assert len(answers) == 2
    seen.assert_all_at(WIDTH)


@quiet
def test_sentence_transformers(tmp_path):
    import sentence_transformers as library
    import transformers
    from sentence_transformers.sentence_transformer import modules

    folder = tmp_path / "bert"
    bare = transformers.BertModel(bert().config)
    bare.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    words = modules.Transformer(str(folder))
    pooling = modules.Pooling(16)
    dense = modules.Dense(16, 32)
    model = library.SentenceTransformer(modules=[words, pooling, dense], device="cpu")
    layer = TailDropout(lengths=td.lengths.Uniform())
    td.insert_each(model, "*.intermediate", layer)
    td.insert(model, "2.activation_function", TailDropout(lengths=td.lengths.Uniform()))
    draw_together(model)
    seen = Seen(model)
    sentences = ["a b c", "d e", "f", "g h i j"] * 2
    with at_width(model, WIDTH):
        vectors = model.encode(sentences, batch_size=4)
    assert (vectors != 0).sum(1).tolist() == [8] * 8
    seen.assert_all_at(WIDTH)
    model.train()
    for _ in range(3):
        features = model.tokenize(sentences)
        model(features)["sentence_embedding"].sum().backward()
    seen.assert_of_one_width(passes=3)


# --- lightning ----------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("parts", [False, True])
def test_lightning(tmp_path, parts, precision):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = network()[:3], network()[3:]
            self.together = None

        def forward(self, x):
            return self.decoder(self.encoder(x))

        def step(self, batch):
            inputs, target = batch
            if not parts:
                return nn.functional.cross_entropy(self(inputs), target)
            with self.together.one_pass():
                output = self.decoder(self.encoder(inputs))
            return nn.functional.cross_entropy(output, target)

        def training_step(self, batch):
            return self.step(batch)

        def validation_step(self, batch):
            self.log("loss", self.step(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model = Module()
    model.together = draw_together(model)
    seen = Seen(model)
    loop = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(data(), BATCH)
    loop.fit(model, loader)
    passes = sum(training for _, training, *_ in seen.calls) // 2
    assert passes >= 3
    seen.assert_of_one_width(passes)
    with at_width(model, WIDTH):
        loop.validate(model, loader, verbose=False)
    seen.assert_all_at(WIDTH)


# --- skorch -------------------------------------------------------------------------------------


@quiet
def test_skorch():
    import skorch

    inputs, target = data().tensors
    x, y = inputs.numpy(), target.numpy().astype(np.int64)
    net = skorch.NeuralNetClassifier(
        network(),
        criterion=nn.CrossEntropyLoss,
        max_epochs=1,
        batch_size=BATCH,
        train_split=None,
        verbose=0,
    ).initialize()
    draw_together(net.module_)
    seen = Seen(net.module_)
    net.partial_fit(x, y)  # fit() would begin with new modules
    seen.assert_of_one_width(passes=3)
    with at_width(net.module_, WIDTH):
        net.score(x, y)
        net.predict_proba(x)
    seen.assert_all_at(WIDTH)


# --- the package itself -------------------------------------------------------------------------


def test_these_tests_would_notice_layers_that_are_apart():
    model = network()
    seen = Seen(model)
    train_one_epoch(model, DataLoader(data(), SAMPLES), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(AssertionError):
        seen.assert_of_one_width(passes=1)
    validate(model, DataLoader(data(), BATCH))
    with pytest.raises(AssertionError):
        seen.assert_all_at(WIDTH)
