"""A tiny T5 and a tiny Llama with random weights, saved as ordinary model directories, and rows for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tpv_worker.backbone import Backbone, DecoderOnly, EncoderDecoder
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
    """Model directories by kind."""
    return make_models(tmp_path_factory.mktemp("models"))


def make_models(root: Path) -> dict[str, Path]:
    """Saves them below a directory; weights large enough that predictions depend on the input."""
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


T5 = {
    "d_model": TOKEN_DIM,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "initializer_factor": 1.6,
    "decoder_start_token_id": 0,
}
LLAMA = {
    "hidden_size": TOKEN_DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
GEMMA = LLAMA | {"sliding_window": 4, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"d_model": TOKEN_DIM, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
BART |= {"init_std": 0.5, "decoder_start_token_id": 0, "pad_token_id": 0}

#: What a model type's configuration differs in from its defaults.
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},  # as t5-v1.1 and flan-t5
    "bart": BART | {"scale_embedding": True},
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": LLAMA,
    "gpt2": {"n_positions": 64, "n_embd": TOKEN_DIM, "n_layer": 2, "n_head": 2, "initializer_range": 0.5},
}


def random_model(model_type: str, **config: Any) -> Any:
    """A model with random weights, large enough that predictions depend on the input."""
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 3, "eos_token_id": 1}
    made = AutoConfig.for_model(model_type, **tokens | config)
    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(made)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Backbone:
    """A tiny model of each family that is said to be supported."""
    model = random_model(request.param, **FAMILIES[request.param])
    kind = EncoderDecoder if model.config.is_encoder_decoder else DecoderOnly
    return kind(model, _tokenizer("$A </s>" if kind is EncoderDecoder else "<s> $A", pad_token="<pad>"))


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
