"""Several small models in one step: seeds, or methods that differ in position only, trained side by side.

A model of a few million parameters does not fill a GPU at the batch that an experiment fixes. M models of one shape do
better together: their weights are stacked along a first dimension, so that M linear layers become one batched product
and M optimizer steps one. Nothing is mixed: model i has its own batches, loss, clipping and moments, as if it were
alone in `training.steps`.

Letters: M models, B sequences, T tokens, C width, H heads, D head dimension, V entries of the vocabulary.
"""

from ropelab.training.batched.steps import check_stackable, stacked_steps

__all__ = [
    "check_stackable",
    "stacked_steps",
]
