"""Pre-trains the lab's tiny T5 and saves it as an ordinary transformers model directory.

`python -m tpv_worker.lab.pretrain --out DIR` made the shipped `model/`: seed 0, 4000 steps of 48 examples, 383 s of CPU
time on one thread. A second run with the same versions (torch 2.13, transformers 5.23) gave the same bytes.

255,296 parameters, 1.03 MB. Questions in natural words answered right (2000 questions, chance 50 %): tense 98.7 %,
formality 98.4 %, number 99.2 %, weather 99.2 %, place 94.8 %, certainty 96.2 %, time 95.8 %, sentiment 98.3 %. Of the
held-out combinations of the targets 98.5 %.

The skills are taken up one after the other, and the words that give one away are also learned by themselves (the
glossary): with 3000 steps the last three stayed at chance.

Architecture: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
https://arxiv.org/abs/1910.10683.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tpv_worker.lab import world
from tpv_worker.lab.batches import NOT_SCORED, Batch, Kind, draw_batch

logger = logging.getLogger(__name__)

SEED = 0
STEPS = 4000
BATCH_SIZE = 48
GLOSSARY_BATCH_SIZE = 256  # its examples are 20 times shorter
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 200
DECAY_SHARE = 0.4  # the last part of the steps, in which the learning rate falls linearly
FIRST_ANSWER_WEIGHT = 4.0  # the answer to the prefix counts this much more than the other answers of a quiz
UNASKED_SHARE = 0.06
LOG_STEPS = 250

FIRST_SKILLS = 3  # asked about from the start; one more joins after each of these shares of the steps
JOIN_SHARES = (0.10, 0.15, 0.20, 0.25, 0.30)
EVEN_POLES_SHARE = 0.15  # the share of the steps at which both poles are asked equally often


@dataclass(frozen=True)
class Phase:
    """A stretch of the schedule: which batches are drawn, and how plainly the prefix asks."""

    until: float
    """Share of all steps at which the phase ends."""
    shares: tuple[float, float, float, float]
    """Of the KINDS."""
    fewest_question_words: int


KINDS: tuple[Kind, ...] = ("glossary", "describe", "quiz", "question")
PHASES = (
    Phase(0.20, shares=(0.15, 0.13, 0.55, 0.17), fewest_question_words=6),
    Phase(0.60, shares=(0.03, 0.07, 0.50, 0.40), fewest_question_words=3),
    Phase(1.00, shares=(0.03, 0.03, 0.30, 0.64), fewest_question_words=1),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends every text with `</s>`, as T5 tokenizers do."""
    pad, eos, unk = world.SPECIAL
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(world.VOCABULARY)}, unk_token=unk))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, world.EOS)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk, model_max_length=128
    )


def build_model() -> T5ForConditionalGeneration:
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=len(world.VOCABULARY),
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        pad_token_id=world.PAD,
        eos_token_id=world.EOS,
        decoder_start_token_id=world.PAD,
    )
    return T5ForConditionalGeneration(config)


def forward(model: T5ForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Logits (n, decoder length, vocabulary)."""
    inputs = torch.from_numpy(batch.inputs)
    decoder_inputs = torch.from_numpy(np.pad(batch.targets[:, :-1], ((0, 0), (1, 0)), constant_values=world.PAD))
    output = model(
        input_ids=inputs,
        attention_mask=(inputs != world.PAD).long(),
        decoder_input_ids=decoder_inputs,
        use_cache=False,
    )
    logits: torch.Tensor = output.logits
    return logits


def loss_of(model: T5ForConditionalGeneration, batch: Batch, kind: Kind) -> torch.Tensor:
    scored = torch.from_numpy(batch.scored)
    losses = functional.cross_entropy(
        forward(model, batch).flatten(0, 1), scored.flatten(), reduction="none", ignore_index=NOT_SCORED
    ).view(scored.shape)
    weights = (scored != NOT_SCORED).float()
    if kind in ("question", "quiz"):
        weights[:, 0] *= FIRST_ANSWER_WEIGHT
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def skill_accuracies(model: T5ForConditionalGeneration, *, n: int = 2000, seed: int = 999) -> dict[str, float]:
    """Share of natural-word questions answered with the right word, per skill; 0.5 is chance."""
    batch = draw_batch(np.random.default_rng(seed), "question", n)
    right = forward(model, batch)[:, 0].argmax(-1).numpy() == batch.targets[:, 0]
    return {skill: float(right[batch.skill == i].mean()) for i, skill in enumerate(world.SKILL_NAMES)}


def pretrain(steps: int = STEPS, seed: int = SEED) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    started, cpu_started = time.perf_counter(), time.process_time()
    for step in range(steps):
        done = step / steps
        phase = next(phase for phase in PHASES if done < phase.until)
        decay = min(1.0, max(0.02, (1 - done) / DECAY_SHARE))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * decay

        kind = KINDS[rng.choice(len(KINDS), p=phase.shares)]
        batch = draw_batch(
            rng,
            kind,
            GLOSSARY_BATCH_SIZE if kind == "glossary" else BATCH_SIZE,
            fewest_question_words=phase.fewest_question_words,
            skills=FIRST_SKILLS + sum(done >= share for share in JOIN_SHARES),
            # Mostly one pole at first: answers are an exclusive-or of pole and attribute, which is hard to start with.
            plus_share=max(0.5, 0.85 - 0.35 * done / EVEN_POLES_SHARE),
            unasked_share=UNASKED_SHARE if kind == "question" else 0.0,
        )
        loss = loss_of(model, batch, kind)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if (step + 1) % LOG_STEPS == 0 or step + 1 == steps:
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            right = " ".join(f"{skill} {share:.3f}" for skill, share in skill_accuracies(model).items())
            logger.info("step %d loss %.3f %.0f s (CPU %.0f s) %s", step + 1, loss.item(), seconds, cpu_seconds, right)
    return model


def save(model: T5ForConditionalGeneration, directory: Path) -> None:
    """Writes what AutoModelForSeq2SeqLM and AutoTokenizer load."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=world.PAD, eos_token_id=world.EOS, decoder_start_token_id=world.PAD, max_new_tokens=4
    )
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the lab's tiny T5.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps; the schedule scales with them")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # Two threads stall whenever something else uses the CPU.
    save(pretrain(options.steps, options.seed), options.out)


if __name__ == "__main__":
    main()
