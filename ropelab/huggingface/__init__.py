"""Hugging Face, both ways: checkpoints under our protocols, runs of ours as checkpoints, and back."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError:
    raise ValueError("this needs transformers, which is not installed: pip install 'ropelab[hf]'") from None

from ropelab.huggingface.export import Exported, export, parity_line
from ropelab.huggingface.import_checkpoint import bring_in
from ropelab.huggingface.model import Checkpoint, evaluate

__all__ = ["Checkpoint", "Exported", "bring_in", "evaluate", "export", "parity_line"]
