from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tests.worker.conftest import BART, T5, random_model
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tpv.files import fingerprint
from tpv.methods import TrainingOptions
from tpv_worker.backbone import Backbone, Prompt, Reading, model_digest
from tpv_worker.data import Example, Row, Task
from tpv_worker.errors import DataError, ModelError, OptionsError
from tpv_worker.evaluation import evaluate
from tpv_worker.methods import Given, PromptTuning
from tpv_worker.training import train

OPTIONS = TrainingOptions(batch_size=8, separator=" | ")
LABELS = ("yes", "no", "w5 yes")


def test_kind_dimension_and_frozen_weights(backbone: Backbone) -> None:
    assert backbone.kind == ("encoder-decoder" if backbone.model.config.is_encoder_decoder else "decoder-only")
    assert backbone.token_dim == 16
    assert backbone.embeddings.dtype == torch.float32
    assert not any(weight.requires_grad for weight in backbone.model.parameters())
    assert not backbone.model.training


def test_padding_changes_neither_loss_nor_gradient(family: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    examples = family.tokenize([*rows[:7], Row("w3 w4 w5 w6", "w7 w8 w9")], OPTIONS, len(prompt))
    assert len({len(example.source) for example in examples}) > 4
    prompt.requires_grad_()
    together = family.loss(prompt, examples)
    (gradient,) = torch.autograd.grad(together, prompt)
    tokens = sum(len(example.target) for example in examples)
    alone = sum(family.loss(prompt, [example]) * len(example.target) / tokens for example in examples)
    (gradient_alone,) = torch.autograd.grad(alone, prompt)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(gradient, gradient_alone, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_padding_changes_no_score_and_no_text(family: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    examples = family.tokenize(rows, OPTIONS, len(prompt))
    labels = [family.target_tokens(word) for word in LABELS]
    alone = torch.cat([family.label_scores(prompt, [example], labels) for example in examples])
    torch.testing.assert_close(family.label_scores(prompt, examples, labels), alone, rtol=1e-4, atol=1e-5)
    texts = [family.generate(prompt, [example], 4)[0] for example in examples]
    assert family.generate(prompt, examples, 4) == texts
    assert len(set(texts)) > 3, "the texts must depend on the sources for this test to mean anything"


def test_logits_are_computed_where_there_are_labels_and_nowhere_else(
    family: Backbone, prompt: Tensor, rows: list[Row]
) -> None:
    """Those of all positions would take more memory than anything else in a step."""
    widths: list[int] = []
    hook = family.model.register_forward_hook(lambda *passed: widths.append(passed[-1].logits.shape[1]))
    family.loss(prompt, family.tokenize([*rows[:7], Row("w3 w4", "w7 w8 w9")], OPTIONS, len(prompt)))
    hook.remove()
    assert widths == [4]


@torch.no_grad()
def test_a_soft_prompt_of_tokens_reads_as_the_tokens(family: Backbone, rows: list[Row]) -> None:
    """Where a model scales its embeddings too: what P_init is drawn from is what the model reads."""
    examples = family.tokenize(rows, OPTIONS, 0)
    tokens = [7, 9, 8]
    longer = [example._replace(source=[*tokens, *example.source]) for example in examples]
    nothing = torch.zeros(0, family.token_dim)
    torch.testing.assert_close(family.loss(family.embeddings[tokens], examples), family.loss(nothing, longer))
    plain = [family._plain(example.source, example.target) for example in longer]
    tokenwise = [cross_entropy(logits, torch.tensor(e.target)) for logits, e in zip(plain, longer, strict=True)]
    torch.testing.assert_close(family.loss(nothing, longer), torch.stack(tokenwise).mean())
    family.probe()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(
    model_paths: dict[str, Path], backbone: Backbone, prompt: Tensor, rows: list[Row], side: str
) -> None:
    other = Backbone.load(model_paths[backbone.kind])
    other.tokenizer.padding_side = side
    expected = backbone.loss(prompt, backbone.tokenize(rows, OPTIONS, len(prompt)))
    assert other.loss(prompt, other.tokenize(rows, OPTIONS, len(prompt))) == expected


@torch.no_grad()
def test_each_row_may_have_its_own_prompt(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    examples = backbone.tokenize(rows[:3], OPTIONS, len(prompt))
    prompts = torch.stack([prompt, 2 * prompt, -prompt])  # (batch, r, d)
    alone = sum(backbone.loss(prompts[i], [examples[i]]) for i in range(3)) / 3  # all targets have two tokens
    torch.testing.assert_close(backbone.loss(prompts, examples), alone)


@torch.no_grad()
def test_label_scores_are_the_loss_of_the_label_as_target(family: Backbone, prompt: Tensor) -> None:
    labels = [family.target_tokens(word) for word in LABELS]
    scores = family.label_scores(prompt, family.tokenize([Row("w2 w3", "yes")], OPTIONS, len(prompt)), labels)
    for word, tokens, score in zip(LABELS, labels, scores[0], strict=True):
        example = family.tokenize([Row("w2 w3", word)], OPTIONS, len(prompt))
        torch.testing.assert_close(-score / len(tokens), family.loss(prompt, example))


@torch.no_grad()
def test_plain_transformers_code_repeats_t5s_predictions(
    model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    path = model_paths["encoder-decoder"]
    ours = Backbone.load(path)
    examples = ours.tokenize(rows, OPTIONS, len(prompt))

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    predictions, texts = [], []
    for source, _ in rows:
        ids = tokenizer(source, truncation=True, max_length=256, return_tensors="pt").input_ids
        embeds = torch.cat([prompt, model.get_input_embeddings()(ids)[0]])[None]
        targets = [torch.tensor([[*tokenizer(w, add_special_tokens=False).input_ids, 1]]) for w in LABELS]
        scores = [-model(inputs_embeds=embeds, labels=t).loss * t.numel() for t in targets]
        predictions.append(LABELS[int(torch.stack(scores).argmax())])
        texts.append(tokenizer.decode(model.generate(inputs_embeds=embeds, max_new_tokens=17)[0], True))

    assert len(set(predictions)) > 1
    assert evaluate(ours, prompt, examples, label_words=LABELS, options=OPTIONS).predictions == predictions
    assert evaluate(ours, prompt, examples, label_words=None, options=OPTIONS).predictions == texts


@torch.no_grad()
def test_plain_transformers_code_repeats_llamas_predictions(
    model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    path = model_paths["decoder-only"]
    ours = Backbone.load(path)
    examples = ours.tokenize(rows, OPTIONS, len(prompt))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    predictions, texts = [], []
    for source, _ in rows:
        ids = tokenizer(source, truncation=True, max_length=256).input_ids
        ids = torch.tensor(ids + tokenizer(" | ", add_special_tokens=False).input_ids)
        scores = []
        for word in LABELS:
            target = torch.tensor([*tokenizer(word, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
            embeds = torch.cat([prompt, model.get_input_embeddings()(torch.cat([ids, target]))])[None]
            labels = torch.cat([torch.full((len(prompt) + len(ids),), -100), target])[None]
            scores.append(-model(inputs_embeds=embeds, labels=labels).loss * len(target))
        predictions.append(LABELS[int(torch.stack(scores).argmax())])
        embeds = torch.cat([prompt, model.get_input_embeddings()(ids)])[None]
        texts.append(tokenizer.decode(model.generate(inputs_embeds=embeds, max_new_tokens=17)[0], True))

    assert len(set(predictions)) > 1
    assert evaluate(ours, prompt, examples, label_words=LABELS, options=OPTIONS).predictions == predictions
    assert evaluate(ours, prompt, examples, label_words=None, options=OPTIONS).predictions == texts


def greedy(backbone: Backbone, prompt: Tensor, example: Example, limit: int) -> str:
    """The likeliest token by the model's predictions, then the likeliest after that, up to the end token."""
    written: list[int] = []
    while len(written) < limit and backbone.end_token not in written:
        known = example._replace(target=[*written, backbone.end_token])
        written.append(int(backbone.predictions(prompt, [known]).logits[0, -1].argmax()))
    return str(backbone.tokenizer.decode(written, skip_special_tokens=True))


#: What published checkpoints bring along, each with a value that would change the texts.
FOREIGN = {
    "do_sample": True,
    "num_beams": 2,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 20,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "suppress_tokens": [5, 9],
    "bad_words_ids": [[10]],
    "max_length": 3,
}
TOKENS = {"eos_token_id": [9, 11], "decoder_start_token_id": 12, "pad_token_id": 13}


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "values"),
    [("generation_config.json", FOREIGN | TOKENS), ("config.json", FOREIGN)],
    ids=["own file", "old"],
)
def test_decoding_is_greedy_whatever_the_checkpoint_says_of_it(
    model_paths: dict[str, Path],
    backbone: Backbone,
    prompt: Tensor,
    rows: list[Row],
    tmp_path: Path,
    file: str,
    values: dict[str, Any],
) -> None:
    model = shutil.copytree(model_paths[backbone.kind], tmp_path / "model")
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | values))
    examples = backbone.tokenize(rows[:9], OPTIONS, len(prompt))
    expected = [greedy(backbone, prompt, example, 6) for example in examples]
    assert len(set(expected)) > 3
    assert Backbone.load(model).generate(prompt, examples, 6) == expected


def test_a_long_source_is_cut_but_keeps_its_special_token(backbone: Backbone) -> None:
    options = OPTIONS.model_copy(update={"max_source_tokens": 3})
    (example,) = backbone.tokenize([Row("w0 w1 w2 w3", "yes")], options, 3)
    tokens = backbone.tokenizer.convert_ids_to_tokens(example.source)
    assert tokens == (["w0", "w1", "</s>"] if backbone.kind == "encoder-decoder" else ["<s>", "w0", "w1", "|"])
    assert backbone.tokenizer.convert_ids_to_tokens(example.target) == ["yes", "</s>"]


def test_a_target_over_the_limit_is_an_error(backbone: Backbone) -> None:
    options = OPTIONS.model_copy(update={"max_target_tokens": 2})
    backbone.tokenize([Row("w1", "w1 w2")], options, 3)
    with pytest.raises(DataError, match="'w1 w2 w3' has 3 tokens, max_target_tokens is 2"):
        backbone.tokenize([Row("w1", "w1 w2 w3")], options, 3)


def test_a_source_is_tokenized_once_for_each_way_of_cutting_it(backbone: Backbone, rows: list[Row]) -> None:
    first, again = (backbone.tokenize(rows, OPTIONS, 3) for _ in range(2))
    assert all(one.source is other.source for one, other in zip(first, again, strict=True))
    short = backbone.tokenize(rows, OPTIONS.model_copy(update={"max_source_tokens": 2}), 3)
    other = backbone.tokenize(rows, OPTIONS.model_copy(update={"separator": "w9"}), 3)
    assert max(len(example.source) for example in short) <= 3
    assert (first == other) == (backbone.kind == "encoder-decoder")


@pytest.mark.parametrize("rows", [[], [Row("w1", " ")]])
def test_no_rows_and_empty_targets_are_errors(backbone: Backbone, rows: list[Row]) -> None:
    with pytest.raises(DataError):
        backbone.tokenize(rows, OPTIONS, 3)


def test_what_does_not_fit_the_context_is_refused(model_paths: dict[str, Path]) -> None:
    llama = Backbone.load(model_paths["decoder-only"])  # its context is 64; 16 for the target, 2 for <s> and separator
    row = Row(" ".join(["w1"] * 20), "yes")
    llama.tokenize([row], OPTIONS, 64 - 16 - 22)
    with pytest.raises(
        OptionsError, match=r"27 virtual tokens, 22 source tokens and 16 target tokens are more than .* 64"
    ):
        llama.tokenize([row], OPTIONS, 64 - 16 - 22 + 1)
    with pytest.raises(
        OptionsError, match=r"64 virtual tokens, .* the model's context of 64: use a shorter soft prompt"
    ):
        llama.tokenize([Row("w1", "yes")], OPTIONS, 64)


def test_the_model_digest_is_what_sha256sum_says(model_paths: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(model_paths["decoder-only"], tmp_path / "model")
    lines = "".join(
        f"{hashlib.sha256((model / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert model_digest(model) == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"

    (model / "README.md").write_text("what is no weight does not count")
    assert model_digest(model) == model_digest(model_paths["decoder-only"])
    with (model / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x7f")
    assert model_digest(model) != model_digest(model_paths["decoder-only"])
    with pytest.raises(ModelError, match="no model directory"):
        model_digest(tmp_path)


def test_the_embedding_digest_is_the_fingerprint_of_the_embeddings(backbone: Backbone) -> None:
    assert backbone.embedding_digest() == fingerprint(backbone.embeddings.numpy())


@pytest.mark.parametrize("config", [{"model_type": "nothing-known"}, None])
def test_what_is_no_model_is_refused(tmp_path: Path, config: dict[str, str] | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load the model"):
        Backbone.load(tmp_path)


# The hub's client reads its environment when it is imported, and pauses between its tries.
ASK_A_HUB = """
import time
time.sleep = lambda seconds: None
from tpv_worker.backbone import Backbone
from tpv_worker.errors import JobError
try:
    Backbone.load("some/model", revision=40 * "a")
except JobError as error:
    print(type(error).__name__, error.reason, error)
"""


class Refusing(BaseHTTPRequestHandler):
    """A hub that answers everything with one status."""

    status = 503

    def do_HEAD(self) -> None:
        if self.status == 0:  # it hangs up
            self.close_connection = True
            return
        self.send_response(self.status)
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815 # the names that http.server asks for

    def log_message(self, *_: Any) -> None: ...


UNANSWERED = "HubUnavailable unavailable the model hub does not answer, and some/model is not in its cache"
WRONG = "ModelError model cannot load the model some/model"


@pytest.mark.parametrize(
    ("offline", "status", "said"),
    [("0", None, UNANSWERED), ("0", 503, UNANSWERED), ("0", 0, UNANSWERED), ("0", 403, WRONG), ("1", None, WRONG)],
    ids=["nobody answers", "it is broken", "it hangs up", "it refuses", "nobody is asked"],
)
@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_no_fault_of_the_model(
    tmp_path: Path, offline: str, status: int | None, said: str
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Refusing,), {"status": status})) as hub:
        if status is not None:
            threading.Thread(target=hub.serve_forever, daemon=True).start()
        else:
            hub.server_close()  # its port is nobody's
        place = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        asked = subprocess.run(
            [sys.executable, "-c", ASK_A_HUB],
            env=os.environ | place | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=True,
        )
        if status is not None:
            hub.shutdown()
    assert asked.stdout.startswith(said)


@pytest.mark.parametrize(
    "cause", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_what_the_machine_lacks_is_no_fault_of_the_model(
    model_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("cannot load the tokenizer") from cause

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(type(cause)) as raised:
        Backbone.load(model_paths["decoder-only"])
    assert raised.value is cause


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "vit", "whisper"])
def test_what_is_neither_encoder_decoder_nor_decoder_is_refused(tmp_path: Path, model_type: str) -> None:
    """Before its weights are looked for."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=f"a model of type '{model_type}' takes no soft prompt here; supported"):
        Backbone.load(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "config", "why"),
    [
        ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}, "looks ahead"),
        ("rwkv", {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}, "reads padding"),
        ("marian", BART | {"scale_embedding": True}, "scales what it is given as embeddings"),
    ],
)
def test_what_reads_a_soft_prompt_in_a_way_of_its_own_is_refused(
    model_paths: dict[str, Path], tmp_path: Path, model_type: str, config: dict[str, Any], why: str
) -> None:
    shutil.copytree(model_paths["decoder-only"], tmp_path, dirs_exist_ok=True)  # for the tokenizer
    random_model(model_type, **config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="supported are encoder-decoder models"):
        Backbone.load(tmp_path)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose tokenizer is a trained SentencePiece model and nothing else, as in google/t5-v1_1-*."""
    path = tmp_path_factory.mktemp("spiece")
    text = ["the cat sat on the mat", "yes and no are words", "a dog ran to the cat"] * 5
    numbers = {"vocab_size": 50, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(path / "spiece"),
        hard_vocab_limit=False,
        minloglevel=2,
        **numbers,
    )
    (path / "spiece.vocab").unlink()
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100}
    config = special | {"additional_special_tokens": extra, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    random_model("t5", **T5 | {"vocab_size": 150}).save_pretrained(path)
    return path


def test_a_tokenizer_may_be_a_sentencepiece_model_alone(spiece: Path, prompt: Tensor) -> None:
    backbone = Backbone.load(spiece)
    plain = SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    rows = [Row("the cat sat on a dog", "yes"), Row("no words", "no")]
    examples = backbone.tokenize(rows, OPTIONS, len(prompt))
    assert [example.source for example in examples] == [[*plain.encode(row.source), 1] for row in rows]
    assert [example.target for example in examples] == [[*plain.encode(row.target), 1] for row in rows]
    method = PromptTuning(OPTIONS, Given(backbone=backbone, initialization=prompt))
    options = OPTIONS.model_copy(update={"steps": 1})
    result = train(backbone, method, [Task(train=rows, label_words=None)], options=options, seed=0)
    assert not torch.equal(result.snapshot.prompt, prompt)


LOAD_WITHOUT = """
import sys
path, *packages = sys.argv[1:]
sys.modules |= dict.fromkeys(packages)  # as if they were not installed
from tpv_worker.backbone import Backbone
from tpv_worker.errors import ModelError
try:
    Backbone.load(path)
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        (["sentencepiece"], "pip install sentencepiece"),
        (["sentencepiece", "google.protobuf"], "pip install sentencepiece protobuf"),
    ],
)
def test_a_package_that_a_tokenizer_lacks_is_named(spiece: Path, packages: list[str], said: str) -> None:
    command = [sys.executable, "-c", LOAD_WITHOUT, str(spiece), *packages]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert asked.stdout.rstrip().endswith(said)


def test_damaged_or_missing_weights_are_refused(model_paths: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(model_paths["decoder-only"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        Backbone.load(model)
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ModelError, match="cannot load the model"):
        Backbone.load(model)


@torch.no_grad()
def test_a_prompt_may_be_a_function_of_what_is_read(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    examples = backbone.tokenize(rows[:9], OPTIONS, len(prompt), task=5)
    labels = [backbone.target_tokens(word) for word in LABELS]
    seen: list[Reading] = []

    def first_word(reading: Reading) -> tuple[Tensor, Tensor]:
        """The soft prompt, with the first token of the source moved to its end; in its place a token of zeros."""
        seen.append(reading)
        first = reading.embeddings[:, :1]
        rest = torch.cat([torch.zeros_like(first), reading.embeddings[:, 1:]], dim=1)
        return torch.cat([prompt.expand(len(first), -1, -1), first], dim=1), rest

    def apart(example: Example) -> Prompt:
        first, *rest = backbone.embeddings[example.source]
        return lambda reading: (torch.cat([prompt, first[None]]), torch.stack([0 * first, *rest])[None])

    assert backbone.num_virtual_tokens(first_word) == len(prompt) + 1
    del seen[:]
    alone = [apart(example) for example in examples]
    expected = torch.stack([backbone.loss(p, [e]) for p, e in zip(alone, examples, strict=True)]).mean()
    torch.testing.assert_close(backbone.loss(first_word, examples), expected)
    scores = torch.cat([backbone.label_scores(p, [e], labels) for p, e in zip(alone, examples, strict=True)])
    torch.testing.assert_close(backbone.label_scores(first_word, examples, labels), scores, rtol=1e-4, atol=1e-5)
    texts = [backbone.generate(p, [e], 4)[0] for p, e in zip(alone, examples, strict=True)]
    assert backbone.generate(first_word, examples, 4) == texts

    for reading in seen:
        assert reading.tasks.tolist() == [5] * 9
        assert reading.mask.sum(dim=1).tolist() == [len(example.source) for example in examples]
        for row, mask, example in zip(reading.embeddings, reading.mask, examples, strict=True):
            assert torch.equal(row[mask], backbone.embeddings[example.source]), "a source without its target"
            assert mask[: len(example.source)].all(), "padding is on the right"


@torch.no_grad()
def test_a_prompt_may_have_no_rows(backbone: Backbone, rows: list[Row]) -> None:
    nothing = torch.zeros(0, backbone.token_dim)
    examples = backbone.tokenize(rows, OPTIONS, 0)
    first = backbone.embeddings[[example.source[0] for example in examples]][:, None]
    shorter = [example._replace(source=example.source[1:]) for example in examples]
    torch.testing.assert_close(backbone.loss(nothing, examples), backbone.loss(first, shorter))


@torch.no_grad()
def test_rounded_weights_keep_prompts_and_losses_in_float32(
    model_paths: dict[str, Path], backbone: Backbone, prompt: Tensor, rows: list[Row]
) -> None:
    rounded = Backbone.load(model_paths[backbone.kind], precision="bfloat16")
    assert {weight.dtype for weight in rounded.model.parameters()} == {torch.bfloat16}
    assert rounded.embedding_digest() == backbone.embedding_digest()
    examples = backbone.tokenize(rows, OPTIONS, len(prompt))
    with torch.enable_grad():
        prompt.requires_grad_()
        loss = rounded.loss(prompt, examples)
        (gradient,) = torch.autograd.grad(loss, prompt)
        (expected,) = torch.autograd.grad(backbone.loss(prompt, examples), prompt)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss, backbone.loss(prompt, examples), rtol=0.05, atol=0)
    assert cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.5  # attention is sharp in these models
    labels = [backbone.target_tokens(word) for word in LABELS]
    assert rounded.label_scores(prompt, examples, labels).dtype == torch.float32
    assert len(rounded.generate(prompt, examples, 3)) == len(rows)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_cpu_computes_in_float32_unless_told_otherwise(model_paths: dict[str, Path], precision: Any) -> None:
    backbone = Backbone.load(model_paths["decoder-only"], precision=precision)
    assert {weight.dtype for weight in backbone.model.parameters()} == {torch.float32}
