"""`ropelab bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ropelab.cli.options import Ctx, Json, Overrides, Pos, app, option, print_json, print_tree, reported, say

WORDS = ("train", "eval", "attention", "many", "start")
TIMED = "rope,alibi,t5,kerple_log"  # by `bench eval` unless --methods says otherwise


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="|".join(WORDS), help="What to time.")],
    overrides: Overrides = None,
    pos: Pos = None,
    ctx: Ctx = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B,..|all", help="train, eval: encodings, beside the first.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="train: also time transformers' GPT-2 and x-transformers.")] = True,
    vocab: Annotated[int, typer.Option(help="train: entries of the vocabulary.")] = 257,
    models: Annotated[int, typer.Option(help="many: how many models.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds; the best counts.")] = 10,
    as_json: Json = False,
) -> None:
    """Time training steps, long evaluations, attention kernels, many small runs, or the start; beside rivals."""
    with reported():
        from ropelab import config
        from ropelab.evaluation import ladder

        if what not in WORDS:
            raise ValueError(f"bench takes {', '.join(WORDS[:-1])} or {WORDS[-1]}, not '{what}'")
        for name, value, low in (("rounds", rounds, 1), ("models", models, 1), ("vocab", vocab, 257)):
            if value < low:
                raise ValueError(f"--{name} must be at least {low}, not {value}")
        settings = list(overrides or [])
        option(settings, "--pos", "pos", pos)
        if methods is not None and what not in ("train", "eval"):
            raise ValueError(f"bench {what} takes no --methods; give --pos NAME")
        if methods is not None and any(item.startswith("pos=") for item in settings):
            raise ValueError("give --pos or --methods, not both")
        if ctx and what not in ("eval", "attention"):
            raise ValueError(f"bench {what} takes no --ctx; use train.ctx={ctx[0]}")
        if what in ("train", "many", "start"):
            from ropelab.bench.train import SHAPE

            given = {item.partition("=")[0] for item in settings}
            if what == "train" and "model" not in given:
                settings = [*(item for item in SHAPE if item.partition("=")[0] not in given), *settings]
        resolved = config.load(settings)
        named = _named(methods or (resolved.pos.name if what == "train" or pos else TIMED))
        from ropelab import bench as timing
        from ropelab import experiment

        experiment.resolve_device(resolved.device)
        if what == "train":
            from ropelab.bench.peers import missing

            for module in missing() if peers else []:
                say(f"{module} is not installed: it is left out")
            result = timing.train(resolved, methods=named, peers=peers, rounds=rounds, vocab=vocab)
        elif what == "eval":
            contexts = ladder((ctx or ["16384,"])[0], 128)
            result = timing.evaluation(resolved, contexts=contexts, methods=named, rounds=rounds)
        elif what == "attention":
            result = timing.attention(resolved, contexts=ladder((ctx or ["512,2048"])[0], 128), rounds=rounds)
        elif what == "many":
            result = timing.many(resolved, models=models, rounds=rounds)
        else:
            result = timing.start(resolved)
        if as_json:
            print_json(result)
        else:
            _print(result)


def _named(text: str) -> list[str]:
    """The encodings of a list; `ValueError` for one that does not exist, and for one named twice."""
    from ropelab import config

    names = list(config.choices("pos")) if text == "all" else [item.strip() for item in text.split(",") if item.strip()]
    if text == "all":
        names.sort(key=lambda name: name != "rope")  # the others are compared with it
    if not names:
        raise ValueError("--methods takes encodings such as rope,alibi, or all")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--methods names {twice} twice")
    for name in names:
        config.load([f"pos={name}"])
    return names


def _print(result: dict[str, Any]) -> None:
    tables = {key: result.pop(key) for key in list(result) if isinstance(result[key], list)}
    peers = result.pop("peers", None)
    print_tree({key: value for key, value in result.items() if value is not None}, as_json=False)
    if peers:
        tables["peers"] = [{"peer": name, **row} for name, row in peers.items()]
    from rich.console import Console
    from rich.table import Table

    for title, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
        for row in rows:
            table.add_row(*(_cell(row.get(column, "")) for column in columns))
        Console().print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
