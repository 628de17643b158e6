"""LoRA: low-rank updates of the model's weight matrices, through the library PEFT; a reference point, no soft prompt.

Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685, Eq. 3:

    h = W_0 x + (alpha / rank) B A x

for each of the chosen matrices W_0 (k, l), with B (k, rank) and A (rank, l).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, LoraModel, get_peft_model_state_dict
from torch import Tensor

from tpv.methods import LoraOptions
from tpv_worker.errors import OptionsError
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod


class Lora(TuningMethod):
    """Trains rank * (k + l) parameters for each updated matrix (k, l); A starts from a draw, B from zero.

    The backbone's model is changed in place, its own weights stay as they are and fixed. There is no soft prompt: the
    model reads the source alone, and P_init is not used. Dropout, LoRA's own too, is off, as everywhere here.

    The artifact: `base_model.model.NAME.lora_A.weight` (rank, l) and `...lora_B.weight` (k, rank) for each module NAME,
    float32, which are the names that PEFT itself writes and reads: the tensors as `adapter_model.safetensors` with
    `facts["adapter_config"]` as `adapter_config.json` are an adapter for `PeftModel.from_pretrained`.
    """

    artifact = True

    def __init__(self, options: LoraOptions, given: Given) -> None:
        super().__init__()
        self.options = options
        config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=options.modules)  # type: ignore[arg-type]
        # PEFT draws from the global generator, which is put back afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(given.seed)
            try:
                self.model = LoraModel(given.backbone.model, config, "default").eval()
            except ValueError as error:  # no such module, or no default for this kind of model
                raise OptionsError(f"modules: {error}") from error
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()  # PEFT gives them the dtype of the matrix that they update
        self.nothing = given.initialization[:0]
        self.facts = {
            "adapter_config": {
                "peft_type": "LORA",
                "r": options.rank,
                "lora_alpha": options.alpha,
                "target_modules": sorted(config.target_modules or ()),
            }
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        return [{"params": self.parameters, "lr": options.learning_rate, "weight_decay": options.weight_decay}]

    def prompt(self) -> Tensor:
        return self.nothing

    def snapshot(self) -> Snapshot:
        tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return Snapshot(prompt=self.nothing, tensors=tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])

    def _tensors(self) -> dict[str, Tensor]:
        # Embeddings are no part of it; asked for automatically, PEFT would look for the base model on the hub.
        tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {f"base_model.{name}": tensor for name, tensor in tensors.items()}  # as a PeftModel around it says
