"""How fast a training step is: ours against PEFT with transformers' Trainer, `dtvg` against plain prompt tuning.

    python benchmarks/training.py [--threads 2] [--blocks 5] [--steps 3]

Batches of 32 rows with sources of exactly 128 tokens and targets of two (a label word and the end token), r = 100
virtual tokens, AdamW, no clipping, float32 on a CPU. Models have random weights: one of T5-small's shape (d = 512, 6
and 6 layers), one of Llama's (d = 512, 8 layers, vocabulary 32000). Both sides train the same soft prompt in front of
the same frozen weights; their first losses are compared before anything is measured. PEFT has
num_transformer_submodules=1: with its default half of a T5 prompt's rows are dead.

A block is one whole call of `train` for some steps, tokens known already, so it has the set-up of either side in it.
Blocks of the two sides alternate; times are those of the median block, a ratio is the median of those of neighbouring
blocks, for a machine's pace drifts. T5 comes twice: with the dropout of its own configuration, which a Trainer leaves
on inside the frozen model (we leave it out, see `tpv_worker.backbone`), and without any.

`dtvg` against plain comes twice as well. As whole steps, in shorter blocks: as many steps as above, in blocks of one.
They show what neither side knows of, but a step takes seconds, and a machine's pace changes by more than what is looked
for. And by parts: what a method itself does in a step (its prompt, the gradient through it, the optimizer) is timed
alone, for the model between them does the same on both sides; what `dtvg` does more is put on a whole plain step.

The group decision alone, pooling of the rescaled vectors included, has r = 100, d = 768.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from tpv.methods import DtvgOptions, PromptTuningOptions
from tpv_worker.backbone import Backbone, DecoderOnly, EncoderDecoder
from tpv_worker.data import Row, Task
from tpv_worker.methods import Dtvg, Given, PromptTuning
from tpv_worker.training import train

BATCH, SOURCE_TOKENS, NUM_VIRTUAL_TOKENS = 32, 128, 100
OPTIONS: dict[str, Any] = {
    "batch_size": BATCH,
    "max_source_tokens": SOURCE_TOKENS,
    "separator": " ",  # no tokens here: the sources are of the same length on both sides
    "schedule": "constant",
    "evaluate_every": 1_000_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, default=5, help="of each side")
    parser.add_argument("--steps", type=int, default=3, help="in a block")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"{platform.processor() or platform.machine()}, threads {torch.get_num_threads()}\n"
        f"{arguments.blocks} alternating blocks of {arguments.steps} steps, batch {BATCH} x {SOURCE_TOKENS} tokens, "
        f"r = {NUM_VIRTUAL_TOKENS}\n"
    )
    print(f"{'samples/s':26}{'ours':>10}{'PEFT':>10}{'ratio':>8}   target >= 1.00, goal 1.30")
    for name, backbone in (
        ("T5-small, dropout 0.1", t5(dropout=0.1)),
        ("T5-small, dropout 0", t5(dropout=0.0)),
        ("Llama", llama()),
    ):
        sides = against_peft(backbone, arguments.steps)
        ours, theirs, ratio = medians(sides, arguments.blocks)
        rows = BATCH * arguments.steps
        print(f"{name:26}{rows / ours:10.2f}{rows / theirs:10.2f}{1 / ratio:8.2f}", flush=True)

    print(f"\n{'ms a step, T5-small':26}{'dtvg':>10}{'plain':>10}{'ratio':>8}{'more work':>12}{'by parts':>10}")
    backbone = t5(dropout=0.0)
    for n, target in ((6, 1.02), (200, 1.10)):
        grouped, alone, ratio = medians(against_plain(backbone, n, steps=1), arguments.blocks * arguments.steps)
        vectors = given(backbone, n)
        more = own_work(Dtvg(DtvgOptions(steps=1, **OPTIONS), vectors)) - own_work(plain(backbone, 1))
        print(
            f"{f'{n} sources':26}{1000 * grouped:10.1f}{1000 * alone:10.1f}{ratio:8.3f}"
            f"{1000 * more:12.2f}{1 + more / alone:10.4f}   target <= {target:.2f}",
            flush=True,
        )

    print(f"\n{'ms a decision':26}{'median':>10}")
    for n, limit in ((6, 0.5), (200, 8.0)):
        print(f"{f'{n} sources':26}{1000 * decision(n):10.3f}{'':11}target <= {limit}", flush=True)


def medians(sides: tuple[Callable[[], object], Callable[[], object]], blocks: int) -> tuple[float, float, float]:
    """Seconds of a block, of each side, and the first's over the second's; one block of each warms up before them."""
    seconds: list[list[float]] = [[], []]
    for block in range(blocks + 1):
        for side, times in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            side()
            if block > 0:
                times.append(time.perf_counter() - started)
    first, second = seconds
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return statistics.median(first), statistics.median(second), statistics.median(ratios)


# --- Models and data -------------------------------------------------------------------------------------------------


def t5(dropout: float) -> Backbone:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, dropout_rate=dropout, decoder_start_token_id=0)  # T5-small's are the defaults
    return EncoderDecoder(T5ForConditionalGeneration(config), tokenizer(config.vocab_size))


def llama() -> Backbone:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    return DecoderOnly(LlamaForCausalLM(config), tokenizer(config.vocab_size))


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


def rows(steps: int) -> list[Row]:
    draw = np.random.default_rng(0)
    sources = draw.integers(10, 30_000, (BATCH * steps, SOURCE_TOKENS))
    return [Row(" ".join(f"w{i}" for i in ids), f"w{2 + n % 2}") for n, ids in enumerate(sources.tolist())]


def given(backbone: Backbone, n: int = 0) -> Given:
    """P_init of tokens; T_t and n sources that have something in common, so that some of them are grouped."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 5000, (NUM_VIRTUAL_TOKENS,), generator=draw)
    P_init = backbone.embeddings[ids].clone()
    common, *vectors = 0.1 * torch.randn(n + 2, *P_init.shape, generator=draw)
    target, *sources = (vector + common for vector in vectors)
    return Given(
        backbone=backbone, initialization=P_init, target=target, sources=torch.stack(sources) if sources else None
    )


# --- The two sides ---------------------------------------------------------------------------------------------------


def tune(backbone: Backbone, method: PromptTuning | Dtvg, data: list[Row]) -> float:
    result = train(backbone, method, [Task(train=data, label_words=None)], options=method.options, seed=0)
    assert result.loss is not None
    return result.loss


def plain(backbone: Backbone, steps: int) -> PromptTuning:
    return PromptTuning(PromptTuningOptions(steps=steps, **OPTIONS), given(backbone))


def against_plain(backbone: Backbone, n: int, steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    data, vectors, options = rows(steps), given(backbone, n), DtvgOptions(steps=steps, **OPTIONS)
    return (
        lambda: tune(backbone, Dtvg(options, vectors), data),
        lambda: tune(backbone, plain(backbone, steps), data),
    )


def own_work(method: PromptTuning | Dtvg) -> float:
    """Seconds that the method's own part of a step takes, the median of many."""
    optimizer = torch.optim.AdamW(method.parameter_groups())
    times = []
    for _ in range(200):
        started = time.perf_counter()
        prompt = method.prompt()
        prompt.backward(torch.ones_like(prompt))
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def against_peft(backbone: Backbone, steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    data = rows(steps)
    examples = backbone.tokenize(data, PromptTuningOptions(**OPTIONS), NUM_VIRTUAL_TOKENS)
    prompt = given(backbone).initialization
    seq2seq = backbone.kind == "encoder-decoder"
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        num_transformer_submodules=1,
    )
    model = peft.get_peft_model(backbone.model, config)
    theirs: Tensor = model.prompt_encoder["default"].embedding.weight
    features: list[Mapping[str, list[int]]] = []
    for source, target, *_ in examples:
        ids = source if seq2seq else source + target
        labels = target if seq2seq else [-100] * len(source) + target
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})

    def run_theirs() -> float:
        with torch.no_grad():
            theirs.copy_(prompt)
        arguments = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(
            output_dir=tempfile.gettempdir(),  # nothing is saved
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=0.3,
            weight_decay=1e-5,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = (Seq2SeqTrainer if seq2seq else Trainer)(
            model=model, args=arguments, train_dataset=features, data_collator=default_data_collator
        )
        trainer.remove_callback(PrinterCallback)
        loss: float = trainer.train().training_loss
        backbone.model.eval()
        return loss

    with torch.no_grad():
        batch = default_data_collator(features[:BATCH])
        theirs.copy_(prompt)
        torch.testing.assert_close(model.eval()(**batch).loss, backbone.loss(prompt, examples[:BATCH]))
    return lambda: tune(backbone, plain(backbone, steps), data), run_theirs


def decision(n: int) -> float:
    """Seconds, the median of many."""
    P_init, common, *vectors = torch.randn(n + 3, NUM_VIRTUAL_TOKENS, 768, generator=torch.Generator().manual_seed(2))
    target, *sources = (vector + common for vector in vectors)
    nobody: Any = None  # no model is asked
    method = Dtvg(
        DtvgOptions(), Given(backbone=nobody, initialization=P_init, target=target, sources=torch.stack(sources))
    )
    times = []
    for _ in range(200):
        started = time.perf_counter()
        method._group()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
