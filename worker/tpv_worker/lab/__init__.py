"""A lab that needs nothing but a CPU: a small world of texts and tasks, and a tiny T5 pre-trained on it."""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).parent / "model"
"""The pre-trained model, an ordinary transformers directory with its tokenizer (1.0 MB)."""

BASE_MODEL = "tpv-registry/lab-t5"
"""Its name in the registry: it comes with the worker, wherever that is installed."""

REVISION = "8f769fa1dbaed49c071bdde248bdc1dd11b00540"
"""Its revision there: the sha256 of its weights file, cut to the length of a commit."""
