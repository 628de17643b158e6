"""Draws an initialization P_init from the input embeddings of a base model, on any machine to the same bytes."""

from __future__ import annotations

import torch
from numpy import float32
from numpy.random import PCG64, Generator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tpv.methods import InitializeOptions
from tpv_worker.errors import OptionsError


def draw(options: InitializeOptions, seed: int, embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """P_init (num_virtual_tokens, d), float32 on the CPU, from the input embeddings (vocabulary, d).

    - `random-vocab`: the embeddings of tokens drawn without replacement among those that are not special and have an
      id below `top_k`; ids of usual vocabularies are sorted by frequency, so these are the most common ones (C.8 of
      Dynamic Task Vector Grouping, https://arxiv.org/abs/2503.18063).
    - `random-uniform`: values uniform in [-range, range) (The Power of Scale for Parameter-Efficient Prompt Tuning,
      https://arxiv.org/abs/2104.08691).
    - `text`: the embeddings of the text's tokens without special ones, repeated or cut to the rows asked for.

    Raises OptionsError when fewer tokens than rows can be drawn, or the text has no tokens.
    """
    rows = options.num_virtual_tokens
    random = Generator(PCG64(seed))
    match options.strategy:
        case "random-uniform":
            unit = random.random((rows, embeddings.shape[1]), dtype=float32)
            return torch.from_numpy((2 * unit - 1) * float32(options.range))
        case "random-vocab":
            special = special_ids(tokenizer)
            common = [i for i in range(min(options.top_k, len(tokenizer), len(embeddings))) if i not in special]
            if len(common) < rows:
                raise OptionsError(f"{rows} virtual tokens are to be drawn among {len(common)} tokens: raise top_k")
            ids = random.choice(common, rows, replace=False).tolist()
        case "text":
            text = tokenizer(options.text or "", add_special_tokens=False).input_ids
            if not text:
                raise OptionsError("strategy `text` needs a text that has tokens")
            ids = [text[i % len(text)] for i in range(rows)]
    return embeddings[ids].detach().float().cpu()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text: the tokenizer's named special tokens and the added ones marked special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
