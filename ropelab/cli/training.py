"""`ropelab train`."""

from __future__ import annotations

from ropelab.cli.options import Ctx, Factor, Json, Overrides, Pos, Scaling, app, option, print_json, reported, say


@app.command()
def train(
    overrides: Overrides = None,
    pos: Pos = None,
    scaling: Scaling = None,
    factor: Factor = None,
    ctx: Ctx = None,
    as_json: Json = False,
) -> None:
    """Train one run; resumes where it stopped, or says that it is finished."""
    with reported():
        from ropelab import config

        settings = list(overrides or [])
        if ctx:
            raise ValueError(f"train takes no --ctx; use train.ctx={ctx[0]}")
        option(settings, "--pos", "pos", pos)
        option(settings, "--scaling", "scaling", scaling)
        option(settings, "--factor", "scaling.factor", factor)
        resolved = config.load(settings)
        from ropelab import experiment
        from ropelab.progress import Bar

        with Bar() as bar:
            result = experiment.train(resolved, progress=bar)
        if as_json:
            print_json(result)
            return
        if result["skipped"]:
            say(f"{result['run']} is finished already (step {result['step']}); nothing was trained")
        print(
            f"{result['run']}: {result['step']} steps, train loss {result['train_loss']:.4f}, "
            f"validation {result['val_nll']:.4f} nats per token, {result['params']:,} parameters, "
            f"{result['tokens_per_s']:,.0f} tokens/s on {result['device']} in {result['dtype']}"
        )
        print(result["run_dir"])
