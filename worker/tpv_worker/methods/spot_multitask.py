"""Multi-task SPoT: one soft prompt, tuned on the mixed data of several tasks.

Vu et al. 2022, SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, https://arxiv.org/abs/2110.07904,
section 2 ("generic transfer"). A row is of task i with probability

    min(e_i, K) / sum over j of min(e_j, K)

with the numbers of rows e and the limit K: examples-proportional mixing, section 3.5.2 of Raffel et al. 2020,
https://arxiv.org/abs/1910.10683. The training loop mixes; `mixing_limit` is K.
"""

from __future__ import annotations

from tpv_worker.methods.prompt_tuning import PromptTuning


class SpotMultitask(PromptTuning):
    """Trains P from P_init, one for all tasks: r * d parameters. A target starts from it by `spot`, as only source."""
