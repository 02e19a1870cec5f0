"""Write docs/commands.md and docs/settings.md: the help of every command, every setting with its default.

    python scripts/command_reference.py           write both
    python scripts/command_reference.py --check   exit status 1 where they are not what the code says

Imports the commands and reads configs/; needs typer, and no torch.
"""

from __future__ import annotations

import argparse
import re
import sys
import typing
from pathlib import Path
from typing import Any

import typer

from ropelab.cli import app

CHECKOUT = Path(__file__).parent.parent
COMMANDS, SETTINGS = CHECKOUT / "docs" / "commands.md", CHECKOUT / "docs" / "settings.md"
GROUPS = {
    "pos": "Position encodings", "scaling": "Scalings of a trained model", "positions": "Positions of training windows",
    "model": "Sizes", "data": "Texts", "launcher": "Where a sweep runs", "search": "Searches",
    "sweep": "Shipped sweeps",
}  # fmt: skip


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def option_names(parameter: Any, hints: dict[str, Any]) -> str:
    """`-o, --output FILE`, as typed; `hints` are the types of the command's arguments."""
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag or parameter.count:
        return names
    kinds = {"int": "N", "float": "X", "Path": "PATH"}
    kind = next((word for name, word in kinds.items() if re.search(rf"\b{name}\b", str(hints[parameter.name]))), "TEXT")
    return f"{names} {parameter.metavar or kind}"


def default_of(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or value is False or callable(value) else f" Default: `{value}`."


def commands_page() -> str:
    """The help of every command that is not hidden, in the order of `ropelab --help`."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [
        "# Commands", "",
        "What `-h` (or `--help`) says, made by `scripts/command_reference.py`. Before the command, `--version` "
        "prints the version. `--json` prints one JSON object and nothing else. Results go to stdout, progress and "
        "messages to stderr.", "",
        "| exit status | meaning |", "|---|---|",
        "| 0 | done |", "| 1 | a run failed, or a verdict is FAIL |",
        "| 2 | a mistake in the command: one line that names the fix; nothing was written |",
        "| 130, 143, 140 | interrupted by INT, TERM or USR2, after saving |", "",
        "`KEY=VALUE` are [settings](settings.md). An option and the setting that it stands for, or one given twice, is "
        "a mistake. Of `--pos`, `--scaling` and the like, `ropelab show` lists the names.", "",
    ]  # fmt: skip
    for name, command in commands.items():
        if command.hidden:
            continue
        hints = typing.get_type_hints(command.callback)
        arguments = [one for one in command.params if type(one).__name__.endswith("Argument")]
        options = [one for one in command.params if one not in arguments and not one.hidden]
        names = [one.metavar or one.name.upper() for one in arguments]
        lines += [f"## {name}", "", "```text", f"ropelab {name} {' '.join([*names, '[OPTIONS]'])}", "```", ""]
        for paragraph in (command.help or "").replace("\b", "").split("\n\n"):
            text = " ".join(paragraph.split())
            if text.startswith("ropelab ") and lines[-2] == "```":  # examples one after another
                lines[-2:] = [text, "```", ""]
            else:
                lines += ["```text", text, "```", ""] if text.startswith("ropelab ") else [text, ""]
        lines += ["| | |", "|---|---|"]
        names += [option_names(one, hints) for one in options]
        for typed, one in zip(names, [*arguments, *options], strict=True):
            lines.append(f"| `{cell(typed)}` | {cell((one.help or '') + default_of(one))} |")
        lines.append("")
    lines += [completion(), ""]
    return "\n".join(lines)


def completion() -> str:
    """How a shell completes commands and options, as far as the application offers it."""
    if any("--install-completion" in one.opts for one in typer.main.get_command(app).params):
        return (
            "## Shell completion\n\nBefore a command, `--install-completion` teaches bash, zsh, fish or PowerShell the "
            "commands, options and names of methods; `--show-completion` prints what it would add."
        )
    return "## Shell completion\n\nThere is none yet."


def head_of(path: Path, key: str) -> str:
    """The comment `# key: ...` at the head of a YAML file."""
    found = re.search(rf"^# {key}: (.*)$", path.read_text(encoding="utf-8"), re.M)
    return found[1] if found else ""


def settings_page() -> str:
    """configs/config.yaml as it stands, and every choice of every group with its parameters."""
    configs = CHECKOUT / "configs"
    lines = [
        "# Settings", "",
        "Every setting with its default, made by `scripts/command_reference.py` from `configs/`. `KEY=VALUE` on the "
        "command line: `train.ctx=512`, `data.tokenizer=bpe`, and `pos=alibi` for a whole group. "
        "`ropelab show KEY=VALUE ...` prints what they come to.", "",
        "```yaml", (configs / "config.yaml").read_text(encoding="utf-8").rstrip("\n"), "```", "",
    ]  # fmt: skip
    for group, title in GROUPS.items():
        lines += [f"## {title}: `{group}`", ""]
        for path in sorted((configs / group).glob("*.yaml")):
            head = re.compile(r"# (label|summary|paper|applies to|dynamic):|name: ")
            body = [line for line in path.read_text(encoding="utf-8").splitlines() if not head.match(line)]
            more = [
                f"{key}: {head_of(path, key)}" for key in ("paper", "applies to") if head_of(path, key) not in ("", "-")
            ]
            said = [head_of(path, "summary"), *more]
            text = ". ".join(part for part in said if part)
            label = head_of(path, "label")
            lines += [
                f"**`{path.stem}`**" + (f" ({label})" if label else "") + (f": {text.rstrip('.')}." if text else ""),
                "",
            ]
            if any(line.strip() for line in body):
                lines += ["```yaml", *body, "```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is old")
    options = parser.parse_args()
    pages = {COMMANDS: commands_page(), SETTINGS: settings_page()}
    old = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if options.check:
            print(f"{path} is not what the code says: run python scripts/command_reference.py", file=sys.stderr)
        else:
            path.write_text(pages[path], encoding="utf-8")
            print(path)
    return bool(old) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
