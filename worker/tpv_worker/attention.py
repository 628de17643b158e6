"""Attention masks that are made without a look at what they hide."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def leave_masks_unread() -> None:
    """Lets transformers' `sdpa` attention, in this process, make its masks by `unread_mask`.

    The models keep the name `sdpa`: some decide by it what else they have to do, and compute something else, without a
    word, under a name of ours. Models that do not use the interface stay as they are.
    """
    AttentionMaskInterface.register("sdpa", unread_mask)


def unread_mask(attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """`sdpa_mask` for a padding mask that is taken to hide something.

    transformers looks at the values, to leave out a mask that hides nothing: on a GPU each forward pass would wait
    until the device has finished all that came before. Who knows that nothing is padded passes no mask.
    """
    if attention_mask is not None:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **options)
    return mask
