"""`ropelab bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from ropelab.cli.options import Ctx, Json, Overrides, Pos, app, option, print_json, print_tree, reported


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="train|eval|attention", help="What to time.")],
    overrides: Overrides = None,
    pos: Pos = None,
    ctx: Ctx = None,
    peers: Annotated[bool, typer.Option(help="train: also time transformers' GPT-2 at the same shape.")] = True,
    rounds: Annotated[int, typer.Option(help="Rounds; the best counts.")] = 10,
    as_json: Json = False,
) -> None:
    """Time training steps beside peers, long evaluations with their memory, or the attention kernels."""
    with reported():
        from ropelab import config
        from ropelab.evaluation import ladder

        if what not in ("train", "eval", "attention"):
            raise ValueError(f"bench takes train, eval or attention, not '{what}'")
        if rounds < 1:
            raise ValueError(f"--rounds must be at least 1, not {rounds}")
        settings = list(overrides or [])
        option(settings, "--pos", "pos", pos)
        from ropelab import bench as timing

        if what == "train":
            if ctx:
                raise ValueError(f"bench train takes no --ctx; use train.ctx={ctx[0]}")
            given = {item.partition("=")[0] for item in settings}
            shape = [] if "model" in given else [i for i in timing.TRAIN_SHAPE if i.partition("=")[0] not in given]
            result = timing.train(config.load([*shape, *settings]), peers=peers, rounds=rounds)
        elif what == "eval":
            resolved = config.load(settings)
            names = ("rope", "alibi") if not pos else ("rope", *(name for name in pos if name != "rope"))
            result = timing.evaluation(resolved, contexts=ladder((ctx or ["16384,"])[0], 128), names=names)
        else:
            result = timing.attention(
                config.load(settings), contexts=ladder((ctx or ["512,2048,8192"])[0], 128), rounds=rounds
            )
        if as_json:
            print_json(result)
            return
        rows = result.pop("rows", None)
        print_tree(result, as_json=False)
        for row in rows or []:
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
            )
