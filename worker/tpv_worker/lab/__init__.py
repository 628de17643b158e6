"""A lab that needs nothing but a CPU: a small world of texts and tasks, and a tiny T5 pre-trained on it."""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).parent / "model"
"""The pre-trained model, an ordinary transformers directory with its tokenizer (1.0 MB)."""
