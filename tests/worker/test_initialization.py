from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tpv.files import fingerprint
from tpv.methods import InitializeOptions
from tpv_worker.backbone import Backbone
from tpv_worker.errors import OptionsError
from tpv_worker.initialization import draw

EMBEDDINGS = torch.arange(47 * 16, dtype=torch.float32).reshape(47, 16) / 8  # row i begins with 2 * i


@pytest.fixture
def tokenizer(model_paths: dict[str, Path]) -> PreTrainedTokenizerBase:
    return Backbone.load(model_paths["encoder-decoder"]).tokenizer


def drawn(tensor: torch.Tensor) -> list[int]:
    return [int(value) // 2 for value in tensor[:, 0].tolist()]


def test_golden_fingerprints(tokenizer: PreTrainedTokenizerBase) -> None:
    """What anybody drew once can be drawn again: a change here makes every stored initialization irreproducible."""
    vocab = draw(InitializeOptions(num_virtual_tokens=20, top_k=40), 42, EMBEDDINGS, tokenizer)
    uniform = draw(InitializeOptions(num_virtual_tokens=20, strategy="random-uniform"), 42, EMBEDDINGS, tokenizer)
    assert fingerprint(vocab.numpy()) == "sha256:bb7e35e4e2ec44421b6c1ee9388437b0ca5d890703fab987d6b7ce4c5ca13062"
    assert fingerprint(uniform.numpy()) == "sha256:c4a677773a13160ba728f0a4b4ea199864e376fd34b457a22e5c087a7046e1de"


def test_random_vocab_is_the_documented_draw(tokenizer: PreTrainedTokenizerBase) -> None:
    options = InitializeOptions(num_virtual_tokens=10, top_k=30)
    candidates = [i for i in range(30) if i not in (0, 1, 2)]  # <pad>, </s> and <unk>, the fixture's special tokens
    expected = np.random.Generator(np.random.PCG64(7)).choice(candidates, 10, replace=False)
    initialization = draw(options, 7, EMBEDDINGS, tokenizer)
    assert drawn(initialization) == expected.tolist()
    assert initialization.shape == (10, 16)
    assert initialization.dtype == torch.float32


def test_special_tokens_are_never_drawn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["w0"]})
    everything = draw(InitializeOptions(num_virtual_tokens=43), 0, EMBEDDINGS, tokenizer)
    special = tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "w0"])
    assert set(drawn(everything)) == set(range(47)) - set(special)
    with pytest.raises(OptionsError, match="44 virtual tokens are to be drawn among 43 tokens"):
        draw(InitializeOptions(num_virtual_tokens=44), 0, EMBEDDINGS, tokenizer)


def test_random_uniform_stays_in_its_range(tokenizer: PreTrainedTokenizerBase) -> None:
    options = InitializeOptions(strategy="random-uniform", num_virtual_tokens=400, range=0.25)
    values = draw(options, 0, EMBEDDINGS, tokenizer)
    assert values.shape == (400, 16)
    assert -0.25 <= float(values.min()) < -0.24
    assert 0.24 < float(values.max()) < 0.25


def test_a_text_is_repeated_or_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.convert_tokens_to_ids(["w3", "yes", "w1"])
    for rows, expected in ((2, ids[:2]), (7, [*ids, *ids, ids[0]])):
        options = InitializeOptions(strategy="text", text="w3 yes w1", num_virtual_tokens=rows)
        assert drawn(draw(options, 0, EMBEDDINGS, tokenizer)) == expected
    with pytest.raises(OptionsError, match="needs a text"):
        draw(InitializeOptions(strategy="text", text=" "), 0, EMBEDDINGS, tokenizer)


def test_the_draw_is_a_copy(backbone: Backbone) -> None:
    initialization = draw(InitializeOptions(num_virtual_tokens=5), 0, backbone.embeddings, backbone.tokenizer)
    before = backbone.embeddings.clone()
    initialization.zero_()
    assert torch.equal(backbone.embeddings, before)
