"""SPoT: prompt tuning that starts from the soft prompt of the most similar source task.

Vu et al. 2022, SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, https://arxiv.org/abs/2110.07904,
section 3 ("targeted transfer"). Tasks are compared by their soft prompts P_init + T, averaged over the r rows:

    sim(t, s) = cos(mean of the rows of P_t, mean of the rows of P_s)

The option `metric` takes other similarities of `tpv.similarity`; with `dot` this is the row TPV in Table 1 of the DTVG
paper (C.1).
"""

from __future__ import annotations

from torch import nn

from tpv.methods import SpotOptions
from tpv.similarity import similarity
from tpv_worker.methods.prompt_tuning import PromptTuning
from tpv_worker.methods.protocol import Given


class Spot(PromptTuning):
    """Trains P from P_init + T_s of the most similar source s, the first one on ties: r * d parameters."""

    def __init__(self, options: SpotOptions, given: Given) -> None:
        super().__init__(options, given)
        assert given.target is not None
        assert given.sources is not None
        start = given.initialization if options.metric == "cosine-prompt" else None
        found = similarity(given.sources, given.target, options.metric, initialization=start).tolist()
        best = max(range(len(found)), key=found.__getitem__)
        self.P = nn.Parameter(given.initialization + given.sources[best])
        names = given.source_names or [f"source {i}" for i in range(len(found))]
        self.facts = {
            "source": names[best],
            "similarity": found[best],
            "similarities": dict(zip(names, found, strict=True)),
        }
