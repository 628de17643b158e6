"""The tuning methods: one small object in one file each, all run by the one loop in `tpv_worker.training`.

Their options are declared in `tpv.methods`; a test holds this table and that one together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tpv_worker.methods.attempt import Attempt
from tpv_worker.methods.dept import Dept
from tpv_worker.methods.dtvg import Dtvg
from tpv_worker.methods.full import Full
from tpv_worker.methods.lora import Lora
from tpv_worker.methods.mpt import Mpt
from tpv_worker.methods.prompt_tuning import PromptTuning
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod
from tpv_worker.methods.spot import Spot
from tpv_worker.methods.spot_multitask import SpotMultitask
from tpv_worker.methods.tpv_sum import TpvSum

__all__ = [
    "METHODS",
    "Attempt",
    "Dept",
    "Dtvg",
    "Full",
    "Given",
    "Lora",
    "Mpt",
    "PromptTuning",
    "Snapshot",
    "Spot",
    "SpotMultitask",
    "TpvSum",
    "TuningMethod",
]

#: By name: what is called with (options, given).
METHODS: Mapping[str, Callable[..., TuningMethod]] = {
    "prompt-tuning": PromptTuning,
    "spot": Spot,
    "spot-multitask": SpotMultitask,
    "tpv-sum": TpvSum,
    "dtvg": Dtvg,
    "attempt": Attempt,
    "mpt": Mpt,
    "dept": Dept,
    "lora": Lora,
    "full": Full,
}
