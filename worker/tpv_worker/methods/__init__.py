"""The tuning methods: one small object in one file each, all run by the one loop in `tpv_worker.training`.

Their options are declared in `tpv.methods`; a test holds this table and that one together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tpv_worker.methods.dtvg import Dtvg
from tpv_worker.methods.prompt_tuning import PromptTuning
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod

__all__ = ["METHODS", "Dtvg", "Given", "PromptTuning", "Snapshot", "TuningMethod"]

#: By name: what is called with (options, given).
METHODS: Mapping[str, Callable[..., TuningMethod]] = {
    "prompt-tuning": PromptTuning,
    "dtvg": Dtvg,
}
