from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.worker.methods.conftest import OPTIONS, count
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tpv.methods import PromptTuningOptions
from tpv_worker.data import Row
from tpv_worker.methods import Given, PromptTuning


def test_it_trains_the_rows_of_the_prompt(given: Given) -> None:
    assert count(PromptTuning(PromptTuningOptions(), given)) == given.initialization.numel()


def surprises(path: Path, P: Tensor, row: Row) -> Tensor:
    """-log Pr(y_i | [P; x], y_<i) for each token of a target and its end, by the files of a model alone: (tokens,)."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    X = tokenizer(row.source).input_ids
    y = [*tokenizer(row.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    model: Any
    if path.name == "t5":
        model = AutoModelForSeq2SeqLM.from_pretrained(path)
        read = torch.cat([P, model.get_input_embeddings()(torch.tensor(X))])
        start = model.config.decoder_start_token_id
        logits = model(inputs_embeds=read[None], decoder_input_ids=torch.tensor([[start, *y[:-1]]])).logits[0]
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
        X += tokenizer(OPTIONS["separator"], add_special_tokens=False).input_ids
        read = torch.cat([P, model.get_input_embeddings()(torch.tensor([*X, *y[:-1]]))])
        logits = model(inputs_embeds=read[None]).logits[0, len(P) + len(X) - 1 :]
    return torch.stack([step.exp().sum().log() - step[token] for step, token in zip(logits, y, strict=True)])


def test_the_loss_is_the_papers_equation(
    given: Given, rows: list[Row], model_paths: dict[str, Path], prompt: Tensor
) -> None:
    """-log Pr(y | [P; x]) as a mean over tokens, so that a row with a long target counts more; and its gradient."""
    rows = [*rows[:5], Row("w3 w4 w5 w6", "w7 w8")]
    method = PromptTuning(PromptTuningOptions(**OPTIONS), given)
    examples = given.backbone.tokenize(rows, method.options, len(prompt))
    loss = method.loss(given.backbone, method.prompt(), examples)
    P = prompt.clone().requires_grad_()
    expected = torch.cat([surprises(model_paths[given.backbone.kind], P, row) for row in rows]).mean()
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, method.P), torch.autograd.grad(expected, P)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
