"""A frozen language model that reads a soft prompt in front of its input: encoder-decoder or decoder-only.

What the model reads, so that anybody can repeat it with plain transformers code:

- source: what `tokenizer(source, truncation=True, max_length=max_source_tokens)` gives. So T5 keeps its end token when
  a source is cut, and a decoder-only tokenizer that begins texts with a special token does so here: it stands between
  soft prompt and source;
- target: its tokens without special ones, then the end token. Loss and label scores count the end token too, else a
  label word that begins another one would always win;
- encoder-decoder: the encoder reads [prompt][source], the decoder writes [target];
- decoder-only: [prompt][source][separator][target], separator and target tokenized on their own without special tokens.

Padding is always outside: right of the encoder's input, left of a decoder-only sequence, whatever side the tokenizer
prefers. So the distance between any two tokens is the same with and without padding, and a decoder-only batch has its
labels at the end, where `logits_to_keep` computes logits for them alone.

The model is in evaluation mode during training as well: dropout inside a frozen model is left out, unlike in the
papers' released code, so that training sees the function that is used afterwards and needs no random numbers.
"""

from __future__ import annotations

import copy
import hashlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from tpv.files import fingerprint
from tpv.methods import TrainingOptions
from tpv_worker import attention, memory
from tpv_worker.data import Example, Row
from tpv_worker.errors import DISK_ERRORS, DataError, HubUnavailable, ModelError, OptionsError

Precision = Literal["auto", "float32", "bfloat16"]
IGNORED = -100  #: label of positions that no loss is taken on; cross_entropy's default
KINDS = (
    "supported are encoder-decoder models (T5 and its like) and decoder-only models (Llama, Qwen, Gemma, GPT-NeoX, "
    "GPT-2 and their like) that transformers can load"
)
PROBE_TOLERANCE = 1e-3  #: of the logits' standard deviation; float32 rounding is far below, a wrong mask far above


@dataclass(frozen=True)
class Reading:
    """The sources of a batch as the model's input embeddings, padded on the right."""

    embeddings: Tensor  #: (batch, length, d)
    mask: Tensor  #: (batch, length), bool, True where a token is
    tasks: Tensor  #: (batch,), each row's place among the tasks that are trained together


#: A soft prompt, (r, d) or one for each row (batch, r, d), float32; r may be 0. Or a function of what is read, which
#: gives such a soft prompt and the embeddings (batch, length, d) to be read in the place of the sources' own.
Prompt = Tensor | Callable[[Reading], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Predictions:
    """What the model says of the targets of a batch."""

    logits: Tensor  #: (batch, tokens, vocabulary), float32
    labels: Tensor  #: (batch, tokens), the targets' tokens, IGNORED where a target is shorter
    #: Last hidden states (batch, length, width) with the mask (batch, length) of what is no padding: of encoder and
    #: decoder, or of a decoder that is alone. Empty unless asked for.
    hidden: Sequence[tuple[Tensor, Tensor]] = ()

    def cross_entropy(self) -> Tensor:
        """Mean over the targets' tokens, in nats: a scalar."""
        return cross_entropy(self.logits.flatten(0, 1), self.labels.flatten())


class Backbone(ABC):
    """A frozen model that reads a `Prompt` in front of its sources, and its tokenizer."""

    kind: ClassVar[Literal["encoder-decoder", "decoder-only"]]

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """`model` is a PreTrainedModel; Any, because each architecture has its own forward()."""
        attention.leave_masks_unread()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token, so a target would have no end")
        self._digest: str | None = None
        self._sources: dict[tuple[int, str], dict[str, list[int]]] = {}  # tokens by text, for each way of cutting
        self.end_token: int = tokenizer.eos_token_id
        # In the place of the checkpoint's own, whose penalties, limits and forced tokens `generate` would apply even
        # beside a configuration that is passed to it.
        self.model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call] # it has no annotations
            eos_token_id=self.end_token, pad_token_id=self.end_token
        )

    @staticmethod
    def load(
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
    ) -> Backbone:
        """The backbone of a local model directory, or of a hub id at a revision.

        Its weights are float32, or rounded to bfloat16 by `precision` (see `TrainingOptions`); soft prompts, logits and
        losses are float32 in any case. Code that comes with a model is never run; a local directory needs no network.
        Raises ModelError when it cannot be loaded, or is of a kind that takes no soft prompt here, and HubUnavailable
        when the hub is needed and does not answer.
        """
        where: dict[str, Any] = {"revision": revision, "local_files_only": Path(path_or_id).is_dir()}
        loading = {"dtype": torch.float32, "output_loading_info": True, **where}
        try:
            config = AutoConfig.from_pretrained(path_or_id, **where)
            kind = _kind(config)
            auto = AutoModelForSeq2SeqLM if kind is EncoderDecoder else AutoModelForCausalLM
            loaded: Any = auto.from_pretrained(path_or_id, config=config, **loading)
            tokenizer = AutoTokenizer.from_pretrained(path_or_id, **where)
        except Exception as error:  # of any sort: what the hub's client raises has no class of its own
            if _is_unanswered(error):
                raise HubUnavailable(f"the model hub does not answer, and {path_or_id} is not in its cache") from error
            for cause in _causes(error):
                if memory.has_run_out(cause) or (isinstance(cause, OSError) and cause.errno in DISK_ERRORS):
                    raise cause from error  # of this machine: the model may be well
            # Missing files, unknown architectures, weights of another shape, damaged weights.
            if isinstance(error, (OSError, ValueError, RuntimeError, SafetensorError)):
                raise ModelError(f"cannot load the model {path_or_id}: {error}{_packages_missing()}") from error
            raise
        model, info = loaded
        if info["missing_keys"]:  # transformers would go on with random weights in their place
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ModelError(f"the weights of {path_or_id} lack {len(info['missing_keys'])} tensors: {missing}")
        backbone = kind(model, tokenizer)
        backbone.probe()
        backbone.place(device, precision)
        return backbone

    def place(self, device: str | torch.device, precision: Precision) -> None:
        """Takes the weights, loaded as float32, to a device, in the precision that is asked for."""
        device = torch.device(device)
        if precision == "bfloat16" or (precision == "auto" and _computes_bfloat16(device)):
            self.embedding_digest()  # of what is rounded away now
            self.model.to(device, torch.bfloat16)
        else:
            self.model.to(device)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def embeddings(self) -> Tensor:
        """What the model reads for each token, (vocabulary, d): some models scale the embeddings in their files."""
        table = self.model.get_input_embeddings()
        if type(table) is nn.Embedding:
            return table.weight
        scaled: Tensor = table(torch.arange(table.num_embeddings, device=self.device))
        return scaled

    @property
    def token_dim(self) -> int:
        """The width d of the input embeddings, and so of a soft prompt."""
        width: int = self.model.get_input_embeddings().weight.shape[1]
        return width

    def embedding_digest(self) -> str:
        """`sha256:...` of the float32 input embeddings: their fingerprint."""
        if self._digest is None:
            self._digest = fingerprint(self.embeddings.float().cpu().numpy())
        return self._digest

    def compile(self) -> None:
        """Compiles the model by `torch.compile`: the first steps take long, minutes for large models."""
        self.model.compile()

    @torch.no_grad()
    def probe(self) -> None:
        """Tries on a few tokens whether the model takes a soft prompt the way this class gives it.

        The embeddings of tokens as soft prompt have to read as the tokens, in a batch with padding as alone, and a
        decoder must not look ahead. Raises ModelError otherwise: every model that transformers has for an architecture
        is welcome, and what is silently wrong (positions that count padding, embeddings scaled in some other place)
        is found here.
        """
        name = type(self.model).__name__
        vocabulary = len(self.model.get_input_embeddings().weight)
        a, b, c, d, e, f, g, h = (vocabulary * i // 9 for i in range(1, 9))
        batch = [Example(source, [f, self.end_token], "") for source in ([c, d], [c, d, e, g, h])]
        try:
            prompt = self.model.get_input_embeddings()(torch.tensor([a, b], device=self.device))
            read = self.predictions(prompt, batch).logits
            plain = torch.stack([self._plain([a, b, *example.source], example.target) for example in batch])
        except Exception as error:  # of any sort: each architecture has its own ideas of what can be passed
            raise ModelError(f"{name} takes no soft prompt ({type(error).__name__}: {error}); {KINDS}") from error
        if not (read - plain).abs().max() <= PROBE_TOLERANCE * plain.std():
            raise ModelError(f"{name} does not read a soft prompt as it reads tokens, padded or not; {KINDS}")

    def num_virtual_tokens(self, prompt: Prompt) -> int:
        """Rows r of a prompt; a function is tried on one token of zeros.

        Raises OptionsError when its width is not that of the model's embeddings.
        """
        if callable(prompt):
            token = torch.zeros(1, 1, self.token_dim, device=self.device)
            nothing = Reading(
                token, torch.ones(1, 1, dtype=torch.bool, device=self.device), torch.zeros_like(token[0, :, 0]).long()
            )
            with torch.no_grad():
                prompt, _ = prompt(nothing)
        if prompt.shape[-1] != self.token_dim:
            raise OptionsError(f"the soft prompt has width {prompt.shape[-1]}, the model's embeddings {self.token_dim}")
        return prompt.shape[-2]

    def tokenize(
        self, rows: Sequence[Row], options: TrainingOptions, num_virtual_tokens: int, task: int = 0
    ) -> list[Example]:
        """The rows of a task as token ids; sources are cut to `max_source_tokens`.

        A source that was tokenized before is not again: a run reads some rows for training, validation and its final
        figures. (On disk they are not kept: a row of 100 words costs half a millisecond, a step of 32 rows seconds on a
        CPU.)

        Raises DataError for a target of more than `max_target_tokens` tokens, OptionsError when soft prompt, the
        longest source and the longest allowed target do not fit the model's context together.
        """
        if not rows:
            raise DataError("there are no rows")
        targets = {text: self.target_tokens(text, options) for text in {row.target for row in rows}}
        sources = self._sources.setdefault((options.max_source_tokens, options.separator), {})
        if unknown := list({row.source for row in rows} - sources.keys()):
            separator = self._separator(options)
            cut = self.tokenizer(unknown, truncation=True, max_length=options.max_source_tokens).input_ids
            sources |= {text: tokens + separator for text, tokens in zip(unknown, cut, strict=True)}
        examples = [Example(sources[row.source], targets[row.target], row.target, task) for row in rows]
        # T5's positions are relative and without a limit: it has no such number.
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        source_tokens = max(len(example.source) for example in examples)
        needed = num_virtual_tokens + source_tokens + options.max_target_tokens
        if context and needed > context:
            short = needed - source_tokens >= context
            raise OptionsError(
                f"{num_virtual_tokens} virtual tokens, {source_tokens} source tokens and {options.max_target_tokens} "
                f"target tokens are more than the model's context of {context}: "
                + ("use a shorter soft prompt" if short else "lower max_source_tokens")
            )
        return examples

    def target_tokens(self, text: str, options: TrainingOptions | None = None) -> list[int]:
        """The tokens that the model has to write for a target or a label word, the end token included.

        Raises DataError when there is nothing but the end token, or more than `max_target_tokens` before it.
        """
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        if not tokens:
            raise DataError(f"the target {text!r} has no tokens")
        if options is not None and len(tokens) > options.max_target_tokens:
            raise DataError(
                f"the target {text[:60]!r} has {len(tokens)} tokens, max_target_tokens is {options.max_target_tokens}"
            )
        return [*tokens, self.end_token]

    def label_tokens(self, words: Sequence[str], options: TrainingOptions) -> list[list[int]]:
        """The `target_tokens` of each label word.

        Raises DataError for those of `target_tokens`, and when two words are the same to the tokenizer.
        """
        labels = [self.target_tokens(word, options) for word in words]
        known: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(words, labels, strict=True):
            if (first := known.setdefault(tuple(tokens), word)) != word:
                raise DataError(f"the label words {first!r} and {word!r} are the same tokens to this model")
        return labels

    def loss(self, prompt: Prompt, batch: Sequence[Example]) -> Tensor:
        """Mean cross entropy, in nats, over all tokens of the batch's targets: a scalar, differentiable."""
        return self.predictions(prompt, batch).cross_entropy()

    @abstractmethod
    def _plain(self, tokens: list[int], target: list[int]) -> Tensor:
        """Logits (len(target), vocabulary) of a target after tokens, by the model alone without anything of ours."""

    @abstractmethod
    def predictions(self, prompt: Prompt, batch: Sequence[Example], *, hidden: bool = False) -> Predictions:
        """What a loss is made of, differentiable; with the hidden states if they are asked for."""

    @abstractmethod
    def label_scores(self, prompt: Prompt, batch: Sequence[Example], label_tokens: Sequence[Sequence[int]]) -> Tensor:
        """Log-probability, in nats, that the model writes exactly this label: (batch, n_labels), float32.

        `label_tokens` are the labels' `target_tokens`.
        """

    @abstractmethod
    def generate(self, prompt: Prompt, batch: Sequence[Example], max_new_tokens: int) -> list[str]:
        """The text that greedy decoding writes for each source, special tokens left out."""

    def _separator(self, options: TrainingOptions) -> list[int]:
        return []

    def _decode(self, tokens: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def _read(self, prompt: Prompt, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """[prompt][source][padding] as embeddings (batch, r + length, d) in the model's dtype, and the mask of it."""
        ids, lengths = self._padded([example.source for example in batch], 0, "right")
        mask = torch.arange(ids.shape[1], device=self.device) < lengths
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        dtype = embeddings.dtype
        if callable(prompt):
            tasks = torch.tensor([example.task for example in batch]).to(self.device, non_blocking=True)
            prompt, embeddings = prompt(Reading(embeddings, mask, tasks))
        read = torch.cat([prompt.to(dtype).expand(len(batch), -1, -1), embeddings.to(dtype)], dim=1)
        return read, pad(mask, (prompt.shape[-2], 0), value=True)

    def _padded(self, rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
        """Rows of ids as one tensor (batch, length), and their lengths (batch, 1)."""
        ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side)
        lengths = torch.tensor([[len(row)] for row in rows])
        # Non-blocking: else each copy would wait until the device has finished the step before.
        return ids.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True)


class EncoderDecoder(Backbone):
    """T5 and its family: the encoder reads the soft prompt, the decoder starts from the target alone."""

    kind = "encoder-decoder"

    def _plain(self, tokens: list[int], target: list[int]) -> Tensor:
        ids = torch.tensor([tokens], device=self.device)
        logits: Tensor = self._decoded(torch.tensor([target], device=self.device), input_ids=ids).logits[0]
        return logits

    def predictions(self, prompt: Prompt, batch: Sequence[Example], *, hidden: bool = False) -> Predictions:
        labels, _ = self._padded([example.target for example in batch], IGNORED, "right")
        inputs = self._inputs(prompt, batch)
        mask = inputs["attention_mask"].bool()
        if _same(len(example.source) for example in batch):
            del inputs["attention_mask"]  # without one there are faster kernels
        output = self._decoded(labels, output_hidden_states=hidden, **inputs)
        states = []
        if hidden:
            states.append((output.encoder_last_hidden_state, mask))
            states.append((output.decoder_hidden_states[-1], labels != IGNORED))
        return Predictions(output.logits.float(), labels, states)

    def label_scores(self, prompt: Prompt, batch: Sequence[Example], label_tokens: Sequence[Sequence[int]]) -> Tensor:
        inputs = self._inputs(prompt, batch)
        encoded = self.model.get_encoder()(**inputs)
        scores = []
        for tokens in label_tokens:
            label = torch.tensor(tokens, device=self.device).expand(len(batch), -1)  # (batch, tokens)
            logits = self._decoded(label, encoder_outputs=encoded, attention_mask=inputs["attention_mask"]).logits
            scores.append(_log_probability(logits, label))
        return torch.stack(scores, dim=1)

    def generate(self, prompt: Prompt, batch: Sequence[Example], max_new_tokens: int) -> list[str]:
        inputs = self._inputs(prompt, batch)
        end = torch.tensor([[self.end_token]], device=self.device)
        start = int(self.model.prepare_decoder_input_ids_from_labels(end))  # what targets start from in training
        return self._decode(self.model.generate(**inputs, max_new_tokens=max_new_tokens, decoder_start_token_id=start))

    def _decoded(self, labels: Tensor, **inputs: Any) -> Any:
        """The model's output, with logits (batch, tokens, vocabulary), for labels (batch, tokens)."""
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels)
        return self.model(decoder_input_ids=shifted, use_cache=False, **inputs)

    def _inputs(self, prompt: Prompt, batch: Sequence[Example]) -> dict[str, Tensor]:
        embeddings, mask = self._read(prompt, batch)
        return {"inputs_embeds": embeddings, "attention_mask": mask.long()}


class DecoderOnly(Backbone):
    """Llama and its like: soft prompt, source, separator and target are one sequence."""

    kind = "decoder-only"

    def _plain(self, tokens: list[int], target: list[int]) -> Tensor:
        ids = torch.tensor([[*tokens, *target, *target]], device=self.device)  # more than it may look at
        first = len(tokens) - 1
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0, first : first + len(target)]
        return logits

    def predictions(self, prompt: Prompt, batch: Sequence[Example], *, hidden: bool = False) -> Predictions:
        labels, _ = self._padded([example.target for example in batch], IGNORED, "left")
        # The end token is predicted, never read; each position predicts the token after it, so the last len(target)
        # positions of a sequence are those with labels.
        inputs = self._inputs(prompt, batch, [example.target[:-1] for example in batch])
        mask, width = inputs["attention_mask"].bool(), labels.shape[1]
        if _same(len(example.source) + len(example.target) for example in batch):
            # Without a mask there are faster kernels; without positions, which are the usual ones then, nobody looks
            # into these for sequences that are packed into one row.
            del inputs["attention_mask"], inputs["position_ids"]
        output = self.model(**inputs, logits_to_keep=width, use_cache=False, output_hidden_states=hidden)
        states = [(output.hidden_states[-1], mask)] if hidden else []
        return Predictions(output.logits[:, -width:].float(), labels, states)

    def label_scores(self, prompt: Prompt, batch: Sequence[Example], label_tokens: Sequence[Sequence[int]]) -> Tensor:
        inputs = self._inputs(prompt, batch)
        read = self.model(**inputs, logits_to_keep=1, use_cache=True)
        scores = []
        for tokens in label_tokens:
            label = torch.tensor(tokens, device=self.device).expand(len(batch), -1)  # (batch, tokens)
            steps = torch.arange(1, len(tokens), device=self.device)
            following = self.model(
                input_ids=label[:, :-1],
                attention_mask=pad(inputs["attention_mask"], (0, len(steps)), value=1),
                position_ids=inputs["position_ids"][:, -1:] + steps,
                past_key_values=copy.deepcopy(read.past_key_values),  # a forward pass appends to the cache it gets
                use_cache=True,
            )
            logits = torch.cat([read.logits[:, -1:], following.logits], dim=1)
            scores.append(_log_probability(logits, label))
        return torch.stack(scores, dim=1)

    def generate(self, prompt: Prompt, batch: Sequence[Example], max_new_tokens: int) -> list[str]:
        inputs = self._inputs(prompt, batch)
        del inputs["position_ids"]  # generate derives the same ones from the mask, and continues them
        return self._decode(self.model.generate(**inputs, max_new_tokens=max_new_tokens))

    def _separator(self, options: TrainingOptions) -> list[int]:
        tokens: list[int] = self.tokenizer(options.separator, add_special_tokens=False).input_ids
        return tokens

    def _inputs(
        self, prompt: Prompt, batch: Sequence[Example], written: Sequence[Sequence[int]] = ()
    ) -> dict[str, Tensor]:
        """[padding][prompt][source][written] as embeddings, its mask, and positions that count from the prompt."""
        embeddings, mask = self._read(prompt, batch)
        width = embeddings.shape[1]
        if written:
            ids, lengths = self._padded(written, 0, "right")
            embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(ids)], dim=1)
            mask = torch.cat([mask, torch.arange(ids.shape[1], device=self.device) < lengths], dim=1)
            sources = max(len(example.source) for example in batch)
            width += max(len(e.source) + len(w) for e, w in zip(batch, written, strict=True)) - sources
        # All padding to the left, the rest in its old order; columns that are padding in every row are left out.
        order = mask.int().argsort(dim=1, stable=True)[:, -width:]
        mask = mask.gather(1, order)
        embeddings = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[2]))
        return {
            "inputs_embeds": embeddings,
            "attention_mask": mask.long(),
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        }


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it came of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_unanswered(error: BaseException) -> bool:
    """Whether this came of a hub that was asked and did not answer, or with an error that is its own."""
    for cause in _causes(error):
        match cause:
            case OfflineModeIsEnabled() | FileMetadataError():  # both are ConnectionError or the like, and stay
                return False
            case HfHubHTTPError():
                return cause.response.status_code >= 500 or cause.response.status_code == 429
            case ConnectionError() | TimeoutError() | socket.gaierror():
                return True
            case _ if "TransportError" in {kind.__name__ for kind in type(cause).__mro__}:
                return True  # of httpx, or of the fork of it that the hub's client has
    return False


def _packages_missing() -> str:
    """What to install for tokenizers like that of T5 1.1; without it transformers asks for one that does not help."""
    packages = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = " ".join(name for name, available in packages.items() if not available)
    return f"; its tokenizer may need what is missing here: pip install {missing}" if missing else ""


def _kind(config: Any) -> type[Backbone]:
    """Raises ModelError for anything but an encoder-decoder or a decoder of text."""
    kind = type(config)
    if config.is_encoder_decoder and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return EncoderDecoder
    # BERT and its like can be loaded as decoders, and would still look ahead.
    looks_ahead = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not config.is_encoder_decoder and kind in MODEL_FOR_CAUSAL_LM_MAPPING and not looks_ahead:
        return DecoderOnly
    raise ModelError(f"a model of type {config.model_type!r} takes no soft prompt here; {KINDS}")


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; a CPU, where it is often slower than float32, is never asked."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _same(lengths: Iterable[int]) -> bool:
    return len(set(lengths)) == 1


def _log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed log-probability of the tokens (batch, n) under logits (batch, n, vocabulary): (batch,)."""
    return logits.float().log_softmax(dim=-1).gather(2, tokens[..., None]).sum(dim=(1, 2))


def model_digest(path: Path) -> str:
    """`sha256:...` of a local model directory: of the lines `sha256sum` prints for its config and weights files.

    `cd PATH && sha256sum config.json model*.safetensors | sha256sum` gives the same digits. Where there are no
    safetensors weights, `pytorch_model*.bin` are taken, as transformers does. Raises ModelError when one is missing.
    """
    weights = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    files = [path / "config.json", *weights]
    if len(files) < 2 or not files[0].is_file():
        raise ModelError(f"{path} is no model directory: it needs config.json and safetensors weights")
    lines = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            lines.update(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.name}\n".encode())
    return f"sha256:{lines.hexdigest()}"
