"""`ropelab export` and `ropelab import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropelab.cli.eval import EVAL_KEYS, scalings_of, text_of
from ropelab.cli.options import (
    MOST,
    Factor,
    Json,
    Overrides,
    Scaling,
    app,
    check_writable,
    fail,
    option,
    print_json,
    print_text,
    reported,
    say,
)

EXPORT_KEYS = EVAL_KEYS[1:]
IMPORT_KEYS = ("data", "runs_dir", "cache_dir")
Run = Annotated[str, typer.Argument(metavar="RUN", help="The finished run.")]


@app.command("export")
def export_run(
    run: Run,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="The new folder.")] = None,
    scaling: Scaling = None,
    factor: Factor = None,
    max_ctx: Annotated[
        int | None,
        typer.Option("--max-ctx", max=MOST, metavar="N", help="Tokens that the model is for; tables reach so far."),
    ] = None,
    as_json: Json = False,
) -> None:
    """A run as a folder that transformers loads as it is, with a proof that both compute the same."""
    with reported():
        settings = list(overrides or [])
        option(settings, "--scaling", "scaling", scaling)
        option(settings, "--factor", "scaling.factor", factor)
        for item in settings:
            if item.partition("=")[0].partition(".")[0] not in EXPORT_KEYS:
                raise ValueError(f"{item}: export takes {', '.join(EXPORT_KEYS)}")
        if output is None:
            raise ValueError("export needs -o DIR, the folder to write")
        if max_ctx is not None and max_ctx < 2:
            raise ValueError(f"--max-ctx must be at least 2, not {max_ctx}")
        check_writable(f"-o {output}", output.absolute())
        from ropelab import config, runs

        base = config.load([item for item in settings if not item.startswith(("scaling", "data"))])
        found = runs.find_run(run, Path(base.runs_dir).expanduser())
        if "checkpoint" in found.manifest():
            raise ValueError(f"{found.name} is a checkpoint already: {found.manifest()['source']}")
        trained = found.manifest()["config"]
        (method,) = scalings_of(trained["scaling"], settings, ())
        text = text_of(trained["data"], settings)
        from ropelab import huggingface
        from ropelab.progress import Bar

        with Bar() as bar:
            done = huggingface.export(
                found, output, scaling=method, max_ctx=max_ctx, other_text=text, device=base.device,
                cache_dir=base.cache_dir, progress=bar,
            )  # fmt: skip
        if as_json:
            print_json({"run": found.name, "folder": str(output), "parity": done.parity})
        if not done.parity["agree"]:
            fail(1, f"{huggingface.parity_line(done.parity)}; {output} is not written")
        say(huggingface.parity_line(done.parity))
        if not as_json:
            print_text(output)


@app.command("import")
def import_checkpoint(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint of our shape: folder or hub name.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """A GPT-NeoX, MPT or GPT-2 checkpoint of our shape as a run: to extend, to search for, to report."""
    with reported():
        settings = list(overrides or [])
        for item in settings:
            if item.partition("=")[0].partition(".")[0] not in IMPORT_KEYS:
                raise ValueError(f"{item}: import takes {', '.join(IMPORT_KEYS)}; the rest is the checkpoint's")
            if item.startswith(("data.tokenizer", "data.vocab_size")):
                raise ValueError(f"{item}: the tokeniser is the checkpoint's own")
        from ropelab import config

        base = config.load([item for item in settings if not item.startswith("data")])
        text = text_of(config.to_dict(base)["data"], settings)
        from ropelab import huggingface
        from ropelab.progress import Bar

        with Bar() as bar:
            run, known = huggingface.bring_in(path, base, text=text, progress=bar)
        if known:
            say(f"{run.name} is there already")
        if as_json:
            print_json({"run": run.name, "run_dir": str(run.path), "status": "done", "skipped": known})
        else:
            print_text(run.name)
