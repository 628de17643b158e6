"""A prompt that a job has tuned, applied by a few lines of plain transformers code: the worker's own predictions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load
from tests.acceptance.conftest import Up, reachable_directory
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tpv import Client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

Models = dict[str, Path]
Rows = list[dict[str, str]]

# Many, because a model with random weights likes few of them; some begin others: the end token decides between those.
LABEL_WORDS = [*(f"w{n}" for n in range(30, 40)), "w30 w31", "w32 w33"]
OPTIONS: dict[str, Any] = {
    "steps": 20,
    "batch_size": 4,
    "evaluate_every": 5,
    "learning_rate": 0.1,
    "max_source_tokens": 5,  # some rows are cut
    "max_target_tokens": 2,
    "separator": "|",
}


# --- What anybody would write ----------------------------------------------------------------------------------------


def read_by_t5(model: Any, tokenizer: Any, prompt: torch.Tensor, source: str, label_words: list[str] | None) -> Any:
    ids = tokenizer(source, truncation=True, max_length=5, return_tensors="pt").input_ids
    embeds = torch.cat([prompt[None], model.get_input_embeddings()(ids)], dim=1)
    if label_words is None:
        written = model.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False)
        return tokenizer.decode(written[0], skip_special_tokens=True)
    losses = []
    for word in label_words:
        target = tokenizer(word, return_tensors="pt").input_ids  # T5's tokenizer adds the end token
        losses.append(model(inputs_embeds=embeds, labels=target).loss * target.shape[1])
    return label_words[torch.stack(losses).argmin()]


def read_by_llama(model: Any, tokenizer: Any, prompt: torch.Tensor, source: str, label_words: list[str] | None) -> Any:
    ids = tokenizer(source, truncation=True, max_length=5).input_ids
    ids += tokenizer("|", add_special_tokens=False).input_ids  # the separator
    embeds = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(ids))])[None]
    if label_words is None:
        written = model.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False)
        return tokenizer.decode(written[0], skip_special_tokens=True)
    losses = []
    for word in label_words:
        target = tokenizer(word + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt").input_ids
        labels = torch.cat([torch.full(embeds.shape[:2], -100), target], dim=1)
        all_embeds = torch.cat([embeds, model.get_input_embeddings()(target)], dim=1)
        losses.append(model(inputs_embeds=all_embeds, labels=labels).loss * target.shape[1])
    return label_words[torch.stack(losses).argmin()]


KINDS = {"encoder-decoder": (AutoModelForSeq2SeqLM, read_by_t5), "decoder-only": (AutoModelForCausalLM, read_by_llama)}


def download(url: str, name: str) -> torch.Tensor:
    """`vector` is T, `prompt` is P_init; both are (num_virtual_tokens, token_dim)."""
    return load(httpx.get(url).raise_for_status().content)[name]


# --- The same from the worker ----------------------------------------------------------------------------------------


def rows(seed: int, count: int) -> Rows:
    """Texts of one to seven words; the target hangs on the first one."""
    draws = np.random.default_rng(seed)
    texts = [[f"w{n}" for n in draws.integers(0, 40, draws.integers(1, 8))] for _ in range(count)]
    return [{"source": " ".join(text), "target": LABEL_WORDS[int(text[0][1:]) % len(LABEL_WORDS)]} for text in texts]


#: In the order in which `upload` takes them.
SPLITS = {"train": rows(1, 48), "validation": rows(2, 16), "test": rows(3, 32)}


@pytest.fixture(scope="module")
def client(model_paths: Models) -> Iterator[Client]:
    """Of a service with one worker, which may load the tiny models."""
    with reachable_directory() as place:
        environment = {"TPV_THREADS": "1", "TPV_DATA_CACHE": str(place / "cache")}
        models = model_paths["decoder-only"].parent
        with (
            Up(place / "data", workers=1, model_directory=models, environment=environment) as running,
            Client(running.url) as client,
        ):
            yield client


@pytest.mark.parametrize("label_words", [LABEL_WORDS, None], ids=["label words", "free text"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_code_predicts_what_the_worker_has_stored(
    client: Client,
    model_paths: Models,
    kind: str,
    label_words: list[str] | None,
) -> None:
    """Row by row and without padding, where the worker reads batches."""
    path, name = model_paths[kind], f"{kind}/{'labels' if label_words else 'text'}"
    client.initializations.create(f"{kind}/family", base_model=str(path), num_virtual_tokens=3, seed=1, timeout=240)
    client.datasets.upload(name, *SPLITS.values(), label_words=label_words)
    job = client.jobs.tune(dataset=name, initialization=f"{kind}/family", output=name, **OPTIONS)
    job.wait(timeout=240)

    api = f"{client.url}/api/v1"
    load_model, read = KINDS[kind]
    model, tokenizer = load_model.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    vector = download(f"{api}/vectors/{name}/versions/newest/content", "vector")
    start = download(f"{api}/initializations/{kind}/family/content", "prompt")

    def predictions(prompt: torch.Tensor, split: Rows) -> list[str]:
        with torch.no_grad():
            return [read(model, tokenizer, prompt, row["source"], label_words).strip() for row in split]

    figures = httpx.get(f"{api}/vectors/{name}/versions/newest/evaluations").raise_for_status().json()
    assert {figure["split"] for figure in figures} == {"validation", "test"}
    for figure in figures:
        lines = httpx.get(f"{api}/evaluations/{figure['id']}/predictions").raise_for_status().text.splitlines()
        stored, split = [json.loads(line)["prediction"] for line in lines], SPLITS[figure["split"]]
        assert predictions(start + vector, split) == stored
        # They hang on the vector and on what is read, so the comparison means something.
        assert predictions(start, split) != stored
        assert len(set(stored)) > 1
        right = sum(prediction == row["target"] for prediction, row in zip(stored, split, strict=True))
        assert figure["value"] == right / len(split)


@pytest.mark.parametrize("read", [read_by_t5, read_by_llama])
def test_the_plain_code_needs_nothing_but_torch(read: Any) -> None:
    assert set(inspect.getclosurevars(read).globals) == {"torch"}
