"""Pictures of results and of encodings, drawn with matplotlib from the JSON objects of `eval` and `show`.

`curves` and `explain` return a `Figure`, `save` writes it. `panels` is where evaluations become lines.
"""

from ropelab.report.figures.breakdown import bucket_labels, observed_words
from ropelab.report.figures.curves import curves
from ropelab.report.figures.explain import explain, mean_cosine
from ropelab.report.figures.lines import (
    CAP,
    Line,
    Panel,
    Point,
    Style,
    around,
    ctx_label,
    number,
    panels,
    ppl_limits,
    ppl_ticks,
    protocol_facts,
    protocol_words,
    styles,
)
from ropelab.report.figures.names import method_name, scaling_name
from ropelab.report.figures.theme import png, save, spread

__all__ = [
    "CAP",
    "Line",
    "Panel",
    "Point",
    "Style",
    "around",
    "bucket_labels",
    "ctx_label",
    "curves",
    "explain",
    "mean_cosine",
    "method_name",
    "number",
    "observed_words",
    "panels",
    "png",
    "ppl_limits",
    "ppl_ticks",
    "protocol_facts",
    "protocol_words",
    "save",
    "scaling_name",
    "spread",
    "styles",
]
