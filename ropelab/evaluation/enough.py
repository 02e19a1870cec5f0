"""What a verdict over an evaluation's texts will lack, known before anything is trained or evaluated."""

from __future__ import annotations

from collections.abc import Iterable

from ropelab.config import Config, DataConfig
from ropelab.data import Split
from ropelab.evaluation.targets import MIN_DOCUMENTS, context_lengths


def lacking_for(config: Config, split: Split) -> str | None:
    """What the test text of a training will lack at the longest ctx that is asked for, else at train.ctx.

    None: nothing; or no document is so long, which an evaluation refuses.
    """
    asked = config.eval.ctx is not None
    longest = max(
        context_lengths(config.eval.ctx, config.train.ctx)[-1] if asked else config.train.ctx, config.eval.max_ctx or 0
    )
    holding = [index for index in range(len(split)) if len(split.document(index)) > longest]
    return None if asked and not holding else lacking(split, holding, longest, config.data)


def lacking(split: Split, documents: Iterable[int], ctx: int, text: DataConfig | None = None) -> str | None:
    """Why the documents of a split that hold `ctx` tokens are too few for a verdict, and what helps.

    Those of one author speak together. None: they are enough.
    """
    used = list(documents)
    speaking = {split.authors[index] or split.digests[index] for index in used}
    if len(speaking) >= MIN_DOCUMENTS:
        return None
    by = f" by {counted(len(speaking), 'author')}" if len(speaking) < len(used) else ""
    own = text is None or text.name in ("text", "hf")
    helps = "own test files (data.test_path), a larger share (data.held_out)" if own else "other text"
    return (
        f"a verdict will lack documents: at ctx {ctx} the {split.name} text has {counted(len(used), 'document')}{by} "
        f"of {len(split)}, and {MIN_DOCUMENTS} are needed; what helps: {helps}, or a shorter eval.ctx"
    )


def counted(number: int, what: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
