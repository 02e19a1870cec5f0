"""Speed, measured where it is claimed: training steps, long evaluations, attention kernels, many small runs, the start.

Rivals are timed in one process, turn by turn, and the best turn of each counts: on a shared machine only ratios are
worth reporting. Texts are random tokens; nothing is kept.
"""

from ropelab.bench.attention import attention
from ropelab.bench.evaluation import evaluation, undefined
from ropelab.bench.many import many
from ropelab.bench.peers import missing
from ropelab.bench.start import start
from ropelab.bench.train import SHAPE, train

__all__ = [
    "SHAPE",
    "attention",
    "evaluation",
    "many",
    "missing",
    "start",
    "train",
    "undefined",
]
