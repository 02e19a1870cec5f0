"""The composition root: from a configuration to a trained run, and from a run to perplexities."""

from ropelab.experiment.devices import DTYPE_NAMES, device_name, environment, resolve_device
from ropelab.experiment.evaluate import NO_SCALING, Evaluated, evaluate, resolve_ladder, scorer_of
from ropelab.experiment.train import Interrupted, build_model, train, training_scaling

__all__ = [
    "DTYPE_NAMES",
    "NO_SCALING",
    "Evaluated",
    "Interrupted",
    "build_model",
    "device_name",
    "environment",
    "evaluate",
    "resolve_device",
    "resolve_ladder",
    "scorer_of",
    "train",
    "training_scaling",
]
