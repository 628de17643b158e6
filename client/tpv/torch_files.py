"""Soft prompts in torch's own files, `.pt` and `.bin`: what the two papers' repositories keep.

These are pickle files, which can run any code when they are loaded. They are read on the user's own machine only, and
only with torch's loader for plain weights, which builds tensors and refuses to call anything else
(https://docs.pytorch.org/docs/stable/generated/torch.load.html, `weights_only`).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from tpv.errors import InvalidTensor, NotInstalled
from tpv.vectors import Float32, as_prompt


def read(path: str | Path) -> Float32:
    """The soft prompt or vector (rows, d) in a file of torch: a plain tensor, or a dict with `prompt_embeddings`.

    A file does not say how many of its rows a model reads: see `tpv.peft`. Needs torch; raises NotInstalled without it,
    InvalidTensor when the file holds anything else, is damaged, or would run code.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{path} is a file of torch; to read it: pip install 'tpv-registry[torch]'") from error
    size = Path(path).stat().st_size
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle protocol, of torch's own old storages
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file makes torch raise almost anything
        raise InvalidTensor(_refusal(path, str(error))) from error
    if isinstance(found, dict):
        if set(found) != {"prompt_embeddings"}:
            keys = ", ".join(map(str, list(found)[:5])) or "nothing"
            raise InvalidTensor(f"{path} holds a dict of {keys!r}; a soft prompt is the one tensor prompt_embeddings")
        found = found["prompt_embeddings"]
    if not isinstance(found, torch.Tensor):
        raise InvalidTensor(f"{path} holds a {type(found).__name__}; a soft prompt is a tensor")
    if found.layout != torch.strided or not found.is_floating_point():
        raise InvalidTensor(f"{path} holds a {found.layout} tensor of {found.dtype}; a soft prompt is one of floats")
    # A view can repeat a few bytes without end, and a copy of it would fill the memory.
    if found.is_meta or found.numel() * found.element_size() > size:
        raise InvalidTensor(f"{path} has {size} bytes, too few for its tensor of shape {list(found.shape)}")
    return as_prompt(found.detach().to(torch.float32).numpy(), "tensor")


def _refusal(path: str | Path, reason: str) -> str:
    """One line; torch's own text goes on for many, and recommends to load the file without any check."""
    if forbidden := re.search(r"GLOBAL ([\w.]+)", reason):
        return f"{path} is refused: it is not plain tensors, it asks for {forbidden[1]}; nothing in it was run"
    return f"{path} is no file of tensors as torch.save writes it, or is damaged"
