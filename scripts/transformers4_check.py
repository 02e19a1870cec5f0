"""Are exports read by transformers 4.x as by 5? Trains small runs, exports them here, and asks a venv of its own.

    python scripts/transformers4_check.py [--python PYTHON_OF_A_VENV] [--keep FOLDER]

Without --python a venv with `transformers>=4.56,<5` is made in a temporary folder (some minutes). For every export the
table has what transformers 4.x makes of it: the largest difference of its logits from ropelab's, as a share of the
largest logit, at 1, 2 and 4 times the training length, and of the loss that `ropelab eval --hf` gives in that venv.
A second table has the losses of the first export where ropelab's attention takes the place of the model's. Exit 1
where one differs by more than 1e-3, or cannot be read and is not expected to be so.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropelab import config, data, evaluation, huggingface, runs, training
from ropelab.config import Method
from ropelab.runs import RunDir

REPOSITORY = Path(__file__).parent.parent
CTX = 32
FACTORS = ["scaling.long_factors=[1.0,1.5,2.5,4.0]", "scaling.short_factors=[1.0,1.0,1.1,1.2]", "scaling.factor=4"]
# name -> settings of the run, scaling of the export
EXPORTS: dict[str, tuple[list[str], list[str]]] = {
    "rope": (["pos=rope"], []),
    "rope, interleaved, half of the head": (["pos=rope", "pos.layout=interleaved", "pos.fraction=0.5"], []),
    "alibi": (["pos=alibi"], []),
    "alibi, 3 heads": (["pos=alibi", "model.n_head=3", "model.d_model=24"], []),
    "learned": (["pos=learned"], []),
    "sinusoidal": (["pos=sinusoidal"], []),
    "sinusoidal_fairseq": (["pos=sinusoidal_fairseq"], []),
    "none": (["pos=none"], []),
    "rope, linear 4": (["pos=rope"], ["scaling=linear", "scaling.factor=4"]),
    "rope, ntk 4": (["pos=rope"], ["scaling=ntk", "scaling.factor=4"]),
    "rope, dynamic_ntk": (["pos=rope"], ["scaling=dynamic_ntk", "scaling.factor=1"]),
    "rope, yarn 4": (["pos=rope"], ["scaling=yarn", "scaling.factor=4"]),
    "rope, ntk_by_parts 4": (["pos=rope"], ["scaling=ntk_by_parts", "scaling.factor=4"]),
    "rope, llama3 4": (["pos=rope"], ["scaling=llama3", "scaling.factor=4"]),
    "rope, longrope 4": (["pos=rope"], ["scaling=longrope", *FACTORS]),
    "p_rope": (["pos=p_rope"], []),
}
NEW_IN_5 = ("p_rope",)  # rotary types that transformers 4 does not know
# what `ropelab eval --hf` puts its own attention there for, asked of the first export
ATTENTION = {
    "rerope": ["scaling=rerope"],
    "self_extend": ["scaling=self_extend"],
    "block_causal": ["scaling=block_causal"],
    "window of 20": ["eval.window=20"],
}

CHILD = """
import json, sys
import numpy as np, torch, transformers
transformers.utils.logging.set_verbosity_error()
answers = {"version": transformers.__version__}
for name, (folder, tokens, logits) in json.load(open(sys.argv[1])).items():
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = "def f(x):\\n    return 'é — 東'"
        assert tokenizer(text)["input_ids"] == list(text.encode()), "the tokens are others"
        worst = 0.0
        for ids, path in zip(tokens, logits):
            due = torch.from_numpy(np.load(path))
            with torch.no_grad():
                got = model(torch.tensor([ids])).logits[0]
            worst = max(worst, float((got - due).abs().max() / due.abs().max()))
        answers[name] = worst
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"
json.dump(answers, open(sys.argv[2], "w"))
"""


def write_text(folder: Path) -> None:
    """Real text with an official test split."""
    names = ("argparse", "calendar", "cmd", "codecs", "copy", "csv", "dis", "fnmatch", "glob", "string", "textwrap")
    for number, name in enumerate(names):
        place = folder / ("test" if number < 4 else "validation" if number == 4 else "train")
        place.mkdir(parents=True, exist_ok=True)
        source = inspect.getsource(importlib.import_module(name))[:12000]
        (place / f"{name}.txt").write_text(source, encoding="utf-8")


def trained(settings: list[str], base: Path) -> RunDir:
    given = {item.partition("=")[0] for item in settings}
    shape = [s for s in ("model.n_layer=2", "model.d_model=32", "model.n_head=4") if s.partition("=")[0] not in given]
    resolved = config.load([
        *settings, *shape, f"train.ctx={CTX}", "train.steps=150", "train.batch_size=16", "train.lr=1e-2",
        "train.dtype=fp32", "data=text", f"data.path={base / 'text'}", *places(base),
    ])  # fmt: skip
    return RunDir(Path(training.train(resolved)["run_dir"]))


def places(base: Path) -> list[str]:
    return [f"runs_dir={base / 'runs'}", f"cache_dir={base / 'cache'}", "device=cpu"]


@torch.no_grad()
def references(run: RunDir, method: Method | None, folder: Path, holds: int) -> tuple[list[list[int]], list[str]]:
    """Tokens and ropelab's logits at 1, 2, 4 times the training length, as far as the export reaches."""
    manifest = run.manifest()
    model = runs.open_run(run).model(torch.device("cpu"))
    if method is not None:
        encoding = runs.encoding_of(config.from_dict(manifest["config"]), method, manifest["original_ctx"])
        runs.set_encoding(model, encoding)
    text = Path(manifest["config"]["data"]["path"], "test", "argparse.txt").read_text(encoding="utf-8")
    tokens = data.load_tokenizer(run.tokenizer_path).encode(text)
    ids, paths = [], []
    for ctx in (CTX, 2 * CTX, 4 * CTX):
        if ctx > holds:
            continue
        ids.append(tokens[:ctx].tolist())
        paths.append(str(folder / f"logits-{ctx}.npy"))
        np.save(paths[-1], model.logits(model(torch.tensor([ids[-1]])))[0].numpy())
    return ids, paths


def venv(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    torch_pin = f"torch=={str(torch.__version__).partition('+')[0]}"
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, torch_pin], check=True)  # first and alone: the pin selects one build
    subprocess.run([*pip, REPOSITORY, "transformers>=4.56,<5"], check=True)
    return python


def evaluated(python: Path, folder: Path, ctx: int, base: Path, how: Sequence[str] = ()) -> float | str:
    """The loss that `ropelab eval --hf` gives in the venv at the longest ctx."""
    others = [f"runs_dir={base / 'runs4'}", *places(base)[1:]]
    command = [python, "-m", "ropelab", "eval", "--hf", folder, "--ctx", f"{ctx},", "--json", *others, *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return float(json.loads(done.stdout)["rows"][-1]["nll"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", type=Path, help="of a venv that has ropelab and transformers 4")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = options.keep or Path(temporary)
        write_text(base / "text")
        python = options.python or venv(base / "venv")
        asked: dict[str, Any] = {}
        rows: dict[str, tuple[float, float | str]] = {}
        for number, (name, (settings, scaling)) in enumerate(EXPORTS.items()):
            run = trained(settings, base)
            method = config.load(scaling).scaling if scaling else None
            folder = base / "exports" / str(number)
            done = huggingface.export(run, folder, scaling=method, device="cpu", cache_dir=str(base / "cache"))
            assert done.parity["agree"], f"{name} does not agree with transformers here"
            longest = max(row["ctx"] for row in done.parity["rows"])
            ids, paths = references(run, method, folder, longest)
            asked[name] = (str(folder), ids, paths)
            resolved = config.load([f"eval.ctx={longest},", *places(base)])
            own = evaluation.evaluate(
                run, resolved.eval, scaling=method, device="cpu", cache_dir=str(base / "cache")
            ).result
            rows[name] = (own.rows[-1].nll, evaluated(python, folder, longest, base))
        run, folder, changes = trained(EXPORTS["rope"][0], base), base / "exports" / "0", {}
        for name, how in ATTENTION.items():
            resolved = config.load([f"eval.ctx={4 * CTX},", *places(base), *how])
            method = resolved.scaling if resolved.scaling.name != "none" else None
            own = evaluation.evaluate(
                run, resolved.eval, scaling=method, device="cpu", cache_dir=str(base / "cache")
            ).result
            changes[name] = (own.rows[-1].nll, evaluated(python, folder, 4 * CTX, base, how))
        (base / "asked.json").write_text(json.dumps(asked))
        command = [python, "-c", CHILD, base / "asked.json", base / "answers.json"]
        subprocess.run(command, check=True)
        answers = json.loads((base / "answers.json").read_text())
    return report(answers, rows, changes)


def report(
    answers: Mapping[str, Any],
    rows: Mapping[str, tuple[float, float | str]],
    changes: Mapping[str, tuple[float, float | str]],
) -> int:
    """Print the tables; 1 where something that should be read is not, or is read otherwise."""
    wrong = 0
    print(f"transformers {answers['version']}")
    print("| export | logits, relative | loss of `ropelab eval --hf` |\n|---|---|---|")
    for name, (due, got) in rows.items():
        logits = answers[name]
        first = logits if isinstance(logits, str) else f"{logits:.1e}"
        second = got if isinstance(got, str) else f"{abs(got - due):.1e}"
        print(f"| {name} | {first} | {second} |")
        fails = isinstance(logits, str) or isinstance(got, str) or logits > 1e-3 or abs(got - due) > 1e-3
        wrong += fails and name not in NEW_IN_5
    print("\n| attention | loss of `ropelab eval --hf` |\n|---|---|")
    for name, (due, got) in changes.items():
        print(f"| {name} | {got if isinstance(got, str) else f'{abs(got - due):.1e}'} |")
        wrong += isinstance(got, str) or abs(got - due) > 1e-3
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
