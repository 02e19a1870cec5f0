"""The composition root: from a configuration to a trained run, and from a run to perplexities."""

from ropelab.experiment.devices import DTYPE_NAMES, device_name, environment, resolve_device
from ropelab.experiment.evaluate import Evaluated, evaluate, resolve_ladder
from ropelab.experiment.models import NO_SCALING, build_model, encoding_of, load_model, set_encoding
from ropelab.experiment.session import compile_blocks, compiles, training_kernel, training_scaling
from ropelab.experiment.train import Interrupted, train, train_together
from ropelab.experiment.trained import scorer_of

__all__ = [
    "DTYPE_NAMES",
    "NO_SCALING",
    "Evaluated",
    "Interrupted",
    "build_model",
    "compile_blocks",
    "compiles",
    "device_name",
    "encoding_of",
    "environment",
    "evaluate",
    "load_model",
    "resolve_device",
    "resolve_ladder",
    "scorer_of",
    "set_encoding",
    "train",
    "train_together",
    "training_kernel",
    "training_scaling",
]
