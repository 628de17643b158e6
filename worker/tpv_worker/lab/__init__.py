"""A lab that needs nothing but a CPU: a small world of texts and tasks, and a tiny T5 pre-trained on it."""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).parent / "model"
"""The pre-trained model, an ordinary transformers directory with its tokenizer (1.0 MB)."""

BASE_MODEL, REVISION = "tpv-registry/lab-t5", "1"
"""Its name in the registry: it comes with the worker, wherever that is installed."""
