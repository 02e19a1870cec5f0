"""`ropelab bench`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ropelab.cli.options import MOST, Ctx, Json, Overrides, Pos, app, option, print_json, print_text, reported, say

WORDS = ("train", "eval", "attention", "many", "start")
METHODS = "rope,alibi,t5,kerple_log,fire"  # of `bench eval`
CTX = {"eval": "16384,", "attention": "512,1024,2048"}
ROUNDS = {"train": 10, "eval": 2, "attention": 5, "many": 3, "start": 1}
WIDTH = 100  # columns of a table


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="|".join(WORDS), help="What to time.")],
    overrides: Overrides = None,
    pos: Pos = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B|all", help="train, eval: several encodings, beside the first of them."),
    ] = None,
    ctx: Ctx = None,
    peers: Annotated[
        bool | None,
        typer.Option("--peers/--no-peers", help="train: beside transformers and x-transformers, where installed."),
    ] = None,
    vocab: Annotated[int | None, typer.Option(max=MOST, help="train, start: entries of the vocabulary (257).")] = None,
    models: Annotated[int | None, typer.Option(max=MOST, help="many: how many (4).")] = None,
    rounds: Annotated[int | None, typer.Option(max=MOST, help="Rounds of which the best counts.")] = None,
    as_json: Json = False,
) -> None:
    """Time training steps beside peers, long evaluations, attention kernels, many small runs, or the start.

    All rivals run in one process, turn by turn, on random tokens.
    """
    with reported():
        from ropelab import config

        if what not in WORDS:
            raise ValueError(f"bench takes {', '.join(WORDS[:-1])} or {WORDS[-1]}, not '{what}'")
        _refuse(what, "--methods", methods, ("train", "eval"), instead="give --pos NAME")
        _refuse(what, "--ctx", ctx, ("eval", "attention"), instead=f"use train.ctx={(ctx or ['N'])[0]}")
        _refuse(what, "--peers", peers, ("train",))
        _refuse(what, "--vocab", vocab, ("train", "start"))
        _refuse(what, "--models", models, ("many",))
        _refuse(what, "--rounds", rounds, WORDS[:-1])
        for name, value, low in (("rounds", rounds, 1), ("models", models, 1), ("vocab", vocab, 3)):
            if value is not None and value < low:
                raise ValueError(f"--{name} must be at least {low}, not {value}")
        if len(pos or []) > 1:
            raise ValueError("--pos takes one encoding" + (", --methods several" if what in ("train", "eval") else ""))
        settings = list(overrides or [])
        option(settings, "--pos", "pos", pos)
        given = {item.partition("=")[0] for item in settings}
        if methods is not None and "pos" in given:
            raise ValueError("give --pos or --methods, not both")
        if what == "train" and "model" not in given:
            from ropelab.bench import SHAPE

            settings = [*(item for item in SHAPE if item.partition("=")[0] not in given), *settings]
        resolved = config.load(settings)
        if what == "train":
            names = _named(methods or resolved.pos.name)
        elif "pos" in given:
            names = list(dict.fromkeys(["rope", resolved.pos.name]))
        else:
            names = _named(methods or METHODS)
        from ropelab import bench as timing
        from ropelab import devices
        from ropelab.evaluation import check_pass, check_training, context_lengths

        device = devices.resolve_device(resolved.device)
        rounds = ROUNDS[what] if rounds is None else rounds
        contexts = context_lengths((ctx or [CTX.get(what, "128,")])[0], 128)
        if what in CTX:
            check_pass(resolved.model, max(contexts), device)
        entries = 257 if vocab is None else vocab
        check_training(resolved, device, original_ctx=resolved.train.ctx, n_vocab=entries, copies=models or 1)
        if what == "train":
            wanted = peers is not False and _peers(asked=peers is True)
            result = timing.train(resolved, methods=names, peers=wanted, rounds=rounds, vocab=entries)
        elif what == "eval":
            if methods == "all":
                from ropelab.bench import undefined

                for name, reason in undefined(resolved, names, max(contexts)).items():
                    say(f"{name} is left out: {reason}")
                    names.remove(name)
            result = timing.evaluation(resolved, contexts=contexts, methods=names, rounds=rounds)
        elif what == "attention":
            result = timing.attention(resolved, contexts=contexts, rounds=rounds)
        elif what == "many":
            result = timing.many(resolved, models=4 if models is None else models, rounds=rounds)
        else:
            result = timing.start(resolved, vocab=entries)
        if as_json:
            print_json(result)
        else:
            print_text(written(result))


def _refuse(what: str, name: str, value: object, allowed: tuple[str, ...], *, instead: str = "") -> None:
    if value is not None and what not in allowed:
        others = " or ".join(allowed)
        raise ValueError(f"bench {what} takes no {name}; {instead or f'it belongs to bench {others}'}")


def _named(text: str) -> list[str]:
    """The encodings of a list; `ValueError` for one that does not exist or comes twice."""
    from ropelab import config

    if text == "all":
        return sorted(config.choices("pos"), key=lambda name: name != "rope")  # the others stand beside it
    names = [item.strip() for item in text.split(",") if item.strip()]
    if not names:
        raise ValueError("--methods takes encodings such as rope,alibi, or all")
    for name in names:
        config.load([f"pos={name}"])
        if names.count(name) > 1:
            raise ValueError(f"--methods names {name} twice")
    return names


def _peers(*, asked: bool) -> bool:
    """True; what is not installed is named. `ValueError` for it where peers were asked for."""
    from ropelab.bench import missing

    for module in missing():
        package = module.replace("_", "-")
        if asked:
            raise ValueError(f"--peers needs {package}, which is not installed: pip install {package}")
        say(f"{package} is not installed: left out")
    return True


# --- tables ---------------------------------------------------------------------------------------------------------


def written(result: dict[str, Any]) -> str:
    """A result for the terminal: its facts a line each, then its lists as tables."""
    facts, tables = [], []
    for key, value in result.items():
        if key == "peers":
            rows = [{"peer": name, **row} for name, row in value.items()]
            tables += [_table(key, rows)] if rows else []
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append(_table(key, value))
        elif isinstance(value, dict):
            facts.append((key, ", ".join(f"{name} {_cell(item)}" for name, item in value.items())))
        elif value is not None and value != []:
            facts.append((key, _cell(value)))
    wide = max((len(key) for key, _ in facts), default=0)
    lines = [
        textwrap.fill(f"{key:{wide}}  {value}", WIDTH, subsequent_indent=" " * (wide + 2), break_on_hyphens=False)
        for key, value in facts
    ]
    return "\n".join([*lines, *tables])


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    """Aligned columns, words to the left and numbers to the right; what is wider than the page is cut at the end."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    words = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    widths = [max(len(line[n]) for line in [columns, *cells]) for n in range(len(columns))]
    align: list[Callable[[str, int], str]] = [str.ljust if word else str.rjust for word in words]
    lines = []
    for line in [columns, *cells]:
        text = "  ".join(place(cell, width) for place, cell, width in zip(align, line, widths, strict=True)).rstrip()
        lines.append(text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…")
    return "\n".join(["", title, *lines])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(_cell(item) for item in value) if isinstance(value, list) else str(value)
