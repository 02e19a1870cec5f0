"""`ropelab runs` and `ropelab data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropelab.cli.options import (
    Json,
    Overrides,
    RunsAndOverrides,
    app,
    print_json,
    print_text,
    print_tree,
    reported,
    say,
    separate,
)
from ropelab.errors import RunError
from ropelab.progress import plain

if TYPE_CHECKING:
    from ropelab.runs import RunDir

STATUSES = ("done", "failed", "interrupted", "running", "damaged")


@app.command("runs")
def list_runs(
    action: Annotated[str, typer.Argument(metavar="[list|rm]", help="What to do.")] = "list",
    arguments: RunsAndOverrides = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    as_json: Json = False,
) -> None:
    """The runs there are, or those that fit: pos=rope,alibi status=done seed=0; `runs rm ...` removes after asking."""
    with reported():
        from ropelab import config, runs

        if "=" in action:
            arguments, action = [action, *(arguments or [])], "list"
        named, settings = separate(list(arguments or []))
        folders = [item for item in settings if item.startswith(("runs_dir=", "cache_dir="))]
        wanted = _wanted([item for item in settings if item not in folders])
        runs_dir = Path(config.load(folders).runs_dir).expanduser()
        if action == "rm":
            if not named and not wanted:
                raise ValueError(
                    "runs rm needs the runs to remove: their names, or what they have, such as status=failed"
                )
            found = [runs.find_run(name, runs_dir) for name in named] or runs.all_runs(runs_dir)
            found = [run for run in found if _fits(run, wanted)]
            if not found:
                say("no run fits; nothing was removed")
            _remove(found, yes=yes)
            return
        if action != "list":
            raise ValueError(f"runs takes list or rm, not '{action}'")
        fields = ("step", "train_loss", "val_nll", "params", "train_ctx", "error")
        rows: list[dict[str, Any]] = []
        for run in [runs.find_run(name, runs_dir) for name in named] or runs.all_runs(runs_dir):
            try:
                status, manifest = run.status(), run.manifest()
            except RunError as error:  # one broken run must not hide the others
                status, manifest = "damaged", {"error": str(error)}
            if not _fits(run, wanted):
                continue
            rows.append({"run": run.name, "status": status, **{key: manifest.get(key) for key in fields}})
        if as_json:
            print_json(rows)
            return
        if not rows:
            say(f"there are no runs in {runs_dir}{' that fit' if wanted else ''}")
        for row in rows:
            loss = "" if row["val_nll"] is None else f"val {row['val_nll']:.4f}"
            length = f"L={row['train_ctx'] or '?'}"
            print_text(plain(f"{row['run']:<44} {row['status']:<12} {length:<8} {loss}  {row['error'] or ''}".rstrip()))


def _wanted(settings: list[str]) -> dict[str, list[str]]:
    """`pos=rope,alibi status=done` as values by key. `ValueError` for a key that no run has."""
    from ropelab import config

    known = ["status", *config.keys()]
    wanted: dict[str, list[str]] = {}
    for item in settings:
        key, _, text = item.partition("=")
        if key in wanted:
            raise ValueError(f"{key} is given twice; give it once, with all its values: {key}=A,B")
        if key not in known and key.partition(".")[0] not in config.METHODS:
            raise ValueError(f"'{item}': runs are not told apart by '{key}'{config.nearest(key, known)}")
        wanted[key] = text.split(",")
        names = STATUSES if key == "status" else config.choices(key) if key in config.METHODS or key == "data" else ()
        strange = next((value for value in wanted[key] if names and value not in names), None)
        if strange is not None:
            raise ValueError(f"{item}: there is no {key} '{strange}'{config.nearest(strange, names)}")
    return wanted


def _fits(run: RunDir, wanted: dict[str, list[str]]) -> bool:
    """Has a run one of the values that are wanted of each key?"""
    from ropelab.errors import RunError

    for key, values in wanted.items():
        try:
            found: Any = run.status() if key == "status" else run.manifest().get("config")
        except RunError:
            found = "damaged" if key == "status" else None
        if key != "status":
            for part in key.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if isinstance(found, dict):
                found = found.get("name")
        if not any(_same(found, value) for value in values):
            return False
    return True


def _same(found: Any, text: str) -> bool:
    """Is a stored value what this text spells? 0.001 is 1e-3, and null is none."""
    if found is None:
        return text in ("null", "none")
    try:
        return not isinstance(found, bool) and float(found) == float(text)
    except (TypeError, ValueError):
        return str(found).lower() == text.lower()


def _remove(found: list[Any], *, yes: bool) -> None:
    from ropelab import files

    for run in found:
        files.own(run.path, run.path.parent)  # before anybody is asked
        if not yes and not typer.confirm(plain(f"Remove {run.path} and its checkpoints and results?"), err=True):
            continue
        with run.locked():
            files.remove(run.path, within=run.path.parent)
        say(f"removed {run.name}")


@app.command("data")
def prepare_data(
    action: Annotated[str, typer.Argument(metavar="[list|prepare]", help="What to do.")] = "list",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """The corpora there are; `data prepare data=books data.tokenizer=bpe` reads, checks and tokenises one."""
    with reported():
        from ropelab import config

        resolved = config.load(list(overrides or []))
        from ropelab import data

        if action == "list":
            found = [
                info._asdict() if hasattr(info, "_asdict") else vars(info) for info in data.describe(resolved.data.path)
            ]
            if as_json:
                print_json(found)
                return
            for info in found:
                present = {True: "here", False: "not here", None: "give data.path"}[info["present"]]
                print_text(f"{info['name']:<12} {present:<16} {info['summary']}")
        elif action == "prepare":
            from ropelab.progress import Bar

            evaluate_only = resolved.data.name in ("nonfiction", "wikitext")
            with Bar() as bar:
                corpus = data.prepare(
                    resolved.data, cache_dir=Path(resolved.cache_dir), evaluate_only=evaluate_only, progress=bar
                )
            splits = {split.name: split for split in (corpus.train, corpus.validation, corpus.test)}
            facts = {
                "name": corpus.name,
                "digest": corpus.digest,
                "tokenizer": corpus.tokenizer.name,
                "n_vocab": corpus.tokenizer.n_vocab,
                "tokens": {name: len(split.tokens) for name, split in splits.items()},
                "longest_test_document": max(
                    (len(corpus.test.document(i)) for i in range(len(corpus.test))), default=0
                ),
                **corpus.details,
            }
            print_tree(facts, as_json=as_json)
        else:
            raise ValueError(f"data takes list or prepare, not '{action}'")
