"""A tiny T5 and a tiny Llama with random weights, saved as ordinary model directories, and rows for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tpv_worker.backbone import Backbone
from tpv_worker.data import Row

WORDS = ["<pad>", "</s>", "<unk>", "<s>", "|", "yes", "no", *(f"w{i}" for i in range(40))]
TOKEN_DIM = 16
NUM_VIRTUAL_TOKENS = 3


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Other tests and other programs share the cores; and one thread gives the same bytes on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories by kind; weights large enough that predictions depend on the input."""
    root = tmp_path_factory.mktemp("models")
    paths = {"encoder-decoder": root / "t5", "decoder-only": root / "llama"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(WORDS),
                d_model=TOKEN_DIM,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                initializer_factor=1.6,
                decoder_start_token_id=0,
            )
        )
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=TOKEN_DIM,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.5,
                bos_token_id=3,
                eos_token_id=1,
            )
        )
    t5.save_pretrained(paths["encoder-decoder"])
    llama.save_pretrained(paths["decoder-only"])
    _tokenizer("$A </s>", pad_token="<pad>").save_pretrained(paths["encoder-decoder"])
    _tokenizer("<s> $A", bos_token="<s>").save_pretrained(paths["decoder-only"])  # as Llama's, without a pad token
    return paths


def _tokenizer(template: str, **special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 3), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>", **special)


@pytest.fixture(scope="session", params=["encoder-decoder", "decoder-only"])
def backbone(request: pytest.FixtureRequest, model_paths: dict[str, Path]) -> Backbone:
    return Backbone.load(model_paths[request.param])


@pytest.fixture
def prompt() -> Tensor:
    """A soft prompt (r, d)."""
    return torch.randn(NUM_VIRTUAL_TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rows() -> list[Row]:
    """24 rows of different lengths; the target is `yes` where the source holds w1."""
    draw = torch.Generator().manual_seed(2)
    rows = []
    for i in range(24):
        words = [f"w{n}" for n in torch.randint(2, 40, (1 + i % 7,), generator=draw).tolist()]
        rows.append(Row(" ".join(["w1", *words] if i % 2 else words), "yes" if i % 2 else "no"))
    return rows
