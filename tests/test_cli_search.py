"""`ropelab search longrope` on a trained run: numbers that `ropelab eval` repeats, kills, fine-tuned runs, mistakes."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropelab import cli, config, data
from ropelab.config import Config
from ropelab.runs import RunDir
from ropelab.search import longrope as searching
from tests.lab import TINY, Process, as_json, changed, invoke, ropelab, waited_for
from tests.lab import refused as mistake

pytestmark = pytest.mark.integration

SHAPE = changed(TINY, "model.d_model=32", "train.steps=3")
SMALL = ["search.population=8", "search.mutations=3", "search.crossovers=3", "search.iterations=2",
         "search.parents=4", "search.samples=3", "search.short_iterations=1"]  # fmt: skip
EVALUATIONS = 8 + 2 * 6
TEST = ["--protocol", "last", "eval.last=64", "eval.tokens=512"]  # as the search reports at 128 tokens


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Texts of random words, a RoPE run whose angles matter, and one without a rotation."""
    root = tmp_path_factory.mktemp("search")
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(300)]
    (root / "text").mkdir()
    for number in range(60):
        words = " ".join(draw.choices(vocabulary, k=120)) + "\n"
        (root / "text" / f"{number}.txt").write_text(words, encoding="utf-8")
    before = {key: os.environ.get(key) for key in ("ROPELAB_RUNS", "ROPELAB_CACHE")}
    os.environ |= {"ROPELAB_RUNS": str(root / "runs"), "ROPELAB_CACHE": str(root / "cache")}
    for pos in ("rope", "alibi"):
        as_json("train", *SHAPE, f"data.path={root / 'text'}", f"pos={pos}")
    run = run_of(root, "rope")
    # larger weights make sharper attention, so that a wrong angle shows in the losses
    larger = {name: 20 if "qkv" in name else 6 for name, tensor in run.load_weights().items() if tensor.dim() >= 2}
    weights = {name: tensor * larger.get(name, 1) for name, tensor in run.load_weights().items()}
    run.save_step(3, {"model": weights}, {}, last=True)
    yield root
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value


def run_of(root: Path, pos: str) -> RunDir:
    (path,) = (root / "runs").glob(f"{pos}-text-*")
    return RunDir(path)


@pytest.fixture(scope="module")
def searched(lab: Path) -> dict[str, Any]:
    """One search, with short factors, and its file beside it."""
    return as_json(
        "search", "longrope", run_of(lab, "rope").name, "--ctx", 128, "--short", "-o", lab / "found.json", *SMALL,
        "eval.tokens=512",
    )  # fmt: skip


def rows(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in part["rows"]}


# --- what a search comes to -----------------------------------------------------------------------------------------


def test_the_file_is_what_eval_takes(lab: Path, searched: dict[str, Any]) -> None:
    """Test and validation numbers of the found factors, from `ropelab eval` with the file, to the last digit."""
    found = json.loads((lab / "found.json").read_bytes())
    assert {key: value for key, value in searched.items() if key not in ("path", "scored")} == found
    run = run_of(lab, "rope")
    on_test = as_json("eval", run.path, "--ctx", "128,", "--scaling", "longrope",
                      f"scaling.factors={lab / 'found.json'}", *TEST)["rows"][0]  # fmt: skip
    row = rows(found["report"])["longrope"]
    assert {key: on_test[key] for key in ("nll", "ppl", "ci95", "tokens")} == {
        key: row[key] for key in ("nll", "ppl", "ci95", "tokens")
    }
    validation = as_json("eval", run.path, "--ctx", "128,", "--scaling", "longrope", "eval.split=validation",
                         f"scaling.factors={lab / 'found.json'}", *TEST[:-1], f"eval.tokens={3 * 128}")  # fmt: skip
    assert validation["protocol"]["document_digests"] == found["search"]["documents"]["digests"]
    assert validation["rows"][0]["nll"] == pytest.approx(found["search"]["nll"], abs=1e-6)
    assert row["search_nll"] == found["search"]["nll"]


@pytest.mark.parametrize("name", ["linear", "ntk", "yarn", "none"])
def test_the_report_is_what_eval_says_of_the_known_scalings(lab: Path, searched: dict[str, Any], name: str) -> None:
    """The methods as they really are, YaRN with its temperature: at factor 4, by `ropelab eval` itself."""
    factor = [] if name == "none" else ["--factor", "4"]
    said = as_json("eval", run_of(lab, "rope").path, "--ctx", "128,", "--scaling", name, *factor, *TEST)
    assert rows(searched["report"])[name]["nll"] == said["rows"][0]["nll"]


def test_a_search_leaves_no_evaluations_in_the_run(lab: Path, searched: dict[str, Any]) -> None:
    """Its candidates, the random one too, are steps of it: a report of the run does not show them as the user's."""
    run = RunDir(lab / "runs" / searched["run"])
    (folder,) = (run.path / "searches").glob(f"*{searched['search']['digest'][:16]}")
    kept = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    at_ctx = {row["nll"] for item in kept for row in item["rows"]}
    assert {row["nll"] for row in searched["report"]["rows"]} <= at_ctx
    asked = [json.loads(path.read_text()) for path in run.results.glob("*.json")]
    random = rows(searched["report"])["random"]["nll"]
    assert all(row["nll"] != random for item in asked for row in item["rows"])


def test_a_search_never_loses_to_the_known_scalings(searched: dict[str, Any]) -> None:
    """On its own search set, to the rounding of one division; and each known scaling scored as a candidate is it."""
    reported = rows(searched["report"])
    for name in searching.KNOWN:
        assert searched["search"]["nll"] <= reported[name]["search_nll"] + 1e-6
        assert searched["search"]["seeds"][name]["nll"] == pytest.approx(reported[name]["search_nll"], abs=1e-6)
    scores = [reported[name]["search_nll"] for name in (*searching.KNOWN, "none", "random")]
    assert len({round(score, 4) for score in scores}) == len(scores)  # different scalings, different losses
    bests = [line["nll"] for line in searched["search"]["history"]]
    assert bests == sorted(bests, reverse=True)
    assert bests[-1] == searched["search"]["nll"]


def test_what_is_found_is_in_the_space(searched: dict[str, Any]) -> None:
    assert (searched["original_ctx"], searched["ctx"], searched["factor"]) == (32, 128, 4.0)
    for factors, bound in ((searched["long_factors"], 5.0), (searched["short_factors"], 5.0)):
        assert len(factors) == 8
        assert factors == sorted(factors)
        assert factors[0] >= 1
        assert factors[-1] <= bound
    assert searched["start_tokens"] in searching.settings().start_tokens
    attention = [1.0, 0.1 * math.log(4) + 1, math.sqrt(1 + math.log(4) / math.log(32))]
    assert min(abs(searched["attention_factor"] - value) for value in attention) < 1e-12


def test_the_random_search_has_the_same_budget(searched: dict[str, Any]) -> None:
    drawn = searched["search"]["random"]
    assert searched["search"]["evaluations"] == drawn["evaluations"] == EVALUATIONS
    assert drawn["nll"] == rows(searched["report"])["random"]["search_nll"]
    assert searched["scored"] == 2 * EVALUATIONS + 8 + 6


def test_search_and_report_are_of_different_documents(lab: Path, searched: dict[str, Any]) -> None:
    """The search saw validation documents only, the report test documents only, as the corpus itself splits them."""
    trained = config.from_dict(run_of(lab, "rope").manifest()["config"])
    corpus = data.prepare(trained.data, cache_dir=lab / "cache")
    used = searched["search"]["documents"]
    assert used["windows"] == 3
    assert used["targets"] == 3 * 64
    assert set(used["digests"]) <= set(corpus.validation.digests)
    reported = searched["report"]["protocol"]["document_digests"]
    assert set(reported) <= set(corpus.test.digests)
    assert not set(reported) & set(used["digests"])


def test_short_factors_serve_the_training_length(lab: Path, searched: dict[str, Any]) -> None:
    """At 32 tokens the file gives what the short search scored; beyond, its short factors change nothing.

    Neither ones nor the long factors were better on the search set."""
    short = searched["search"]["short"]
    assert short["ctx"] == 32
    assert short["documents"]["windows"] == 3 * 128 // 32
    assert short["factors"] == searched["short_factors"]
    assert short["nll"] <= min(short["seeds"]["ones"], short["seeds"]["long"])
    said = as_json("eval", run_of(lab, "rope").path, "--ctx", "32,", "--scaling", "longrope",
                   f"scaling.factors={lab / 'found.json'}", "--protocol", "last", "eval.last=16",
                   "eval.tokens=512")  # fmt: skip
    reported = rows(searched["report"]["short"])
    assert said["rows"][0]["nll"] == reported["longrope"]["nll"]
    assert reported["longrope"]["search_nll"] == short["nll"]
    assert reported["long_factors"]["search_nll"] == pytest.approx(short["seeds"]["long"], abs=1e-6)
    without = json.loads((lab / "found.json").read_bytes()) | {"short_factors": []}
    (lab / "without.json").write_text(json.dumps(without), encoding="utf-8")
    long = [
        as_json("eval", run_of(lab, "rope").path, "--ctx", "128,", "--scaling", "longrope", f"scaling.factors={file}",
                *TEST)["rows"][0]["nll"]
        for file in (lab / "found.json", lab / "without.json")
    ]  # fmt: skip
    assert long[0] == long[1]


def test_a_finished_search_is_not_repeated(lab: Path, searched: dict[str, Any]) -> None:
    path = Path(as_json("search", "longrope", run_of(lab, "rope").path, "--ctx", 128, "--short", *SMALL,
                        "eval.tokens=512")["path"])  # fmt: skip
    before = path.stat().st_mtime_ns
    done = invoke("search", "longrope", run_of(lab, "rope").path, "--ctx", 128, "--short", *SMALL, "eval.tokens=512")
    assert done.exit_code == 0, done.stderr
    assert "finished already" in done.stderr
    assert path.stat().st_mtime_ns == before
    for name in ("longrope", "linear", "ntk", "yarn", "random", "none"):
        assert name in done.stdout
    assert str(path) in done.stdout.replace("\n", "")


@pytest.mark.parametrize("change", ["seed=1", "search.iterations=1", "search.samples=2"])
def test_another_question_is_another_search(lab: Path, searched: dict[str, Any], change: str) -> None:
    key = change.partition("=")[0]
    settings = [*(item for item in SMALL if not item.startswith(f"{key}=")), change]
    other = as_json("search", "longrope", run_of(lab, "rope").path, "--ctx", 128, *settings, "eval.tokens=512")
    assert other["search"]["digest"] != searched["search"]["digest"]
    assert other["scored"] > 0


# --- the seeds ------------------------------------------------------------------------------------------------------


def question(ctx: int, factor: float, *changes: str) -> searching.Question:
    trained: Config = config.load(["model.d_model=128", "model.n_head=2", "train.ctx=512", *changes])
    return searching.Question(trained, trained.train.ctx, ctx, factor)


@pytest.mark.parametrize("factor", [2.0, 3.0, 8.0])
def test_the_seeds_are_the_known_scalings(factor: float) -> None:
    """PI and NTK by their formulas, YaRN by transformers' spectrum: 32 pairs, original_ctx 512."""
    asked = question(4096, factor)
    seeds = searching._seeds(asked)
    assert list(seeds) == ["linear", "ntk", "yarn"]
    assert seeds["linear"].factors == pytest.approx([factor] * 32, rel=1e-12)
    assert seeds["ntk"].factors == pytest.approx([factor ** (2 * i / 62) for i in range(32)], rel=1e-12)
    hf = LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "original_max_position_embeddings": 512,
        },
    )  # fmt: skip
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](hf, torch.device("cpu"))
    plain = [10000 ** (-2 * i / 64) for i in range(32)]
    expected = [a / b for a, b in zip(plain, inv_freq.tolist(), strict=True)]
    assert seeds["yarn"].factors == pytest.approx(expected, rel=1e-6)
    assert seeds["yarn"].attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert [seeds[name].attention_factor for name in ("linear", "ntk")] == [1.0, 1.0]
    for seed in seeds.values():
        assert seed.start_tokens == 0
        assert all(1 <= before <= after for before, after in zip(seed.factors, seed.factors[1:], strict=False))


def test_pairs_that_do_not_turn_have_a_factor_all_the_same() -> None:
    """p-RoPE leaves slow pairs at frequency 0: 0 / 0 is no number, and scaling=longrope takes none."""
    asked = question(4096, 8.0, "pos=p_rope")
    for seed in searching._seeds(asked).values():
        assert all(math.isfinite(value) for value in seed.factors)
        asked.build(asked.method(seed))


# --- fine-tuned runs ------------------------------------------------------------------------------------------------


def test_search_fine_tune_search(lab: Path, searched: dict[str, Any]) -> None:
    """The child's search refers to the root's length, and begins with what the child was trained with, as it is and
    stretched: factors stay relative to the unscaled spectrum."""
    first = as_json("search", "longrope", run_of(lab, "rope").path, "--ctx", 64, "-o", lab / "first.json", *SMALL,
                    "eval.tokens=512")  # fmt: skip
    child = as_json("train", "--from", run_of(lab, "rope").name, "--scaling", "longrope",
                    f"scaling.factors={lab / 'first.json'}", "train.ctx=64", "train.steps=4")  # fmt: skip
    second = as_json("search", "longrope", child["run_dir"], "--ctx", 128, *SMALL, "eval.tokens=512")
    assert (second["original_ctx"], second["factor"]) == (32, 4.0)
    seeds = second["search"]["seeds"]
    assert seeds["trained"]["factors"] == pytest.approx(first["long_factors"], rel=1e-12)
    assert seeds["trained"]["start_tokens"] == first["start_tokens"]
    assert seeds["trained"]["attention_factor"] == first["attention_factor"]
    # from factor 2 to factor 4: 1 + (lambda - 1) (4 - 1) / (2 - 1)
    assert seeds["stretched"]["factors"] == pytest.approx([1 + 3 * (f - 1) for f in first["long_factors"]], rel=1e-12)
    assert second["search"]["nll"] <= min(seed["nll"] for seed in seeds.values())
    reported = rows(second["report"])
    assert reported["trained"]["search_nll"] == pytest.approx(seeds["trained"]["nll"], abs=1e-6)
    kept = as_json("eval", child["run_dir"], "--ctx", "128,", *TEST)
    assert reported["trained"]["nll"] == kept["rows"][0]["nll"]


# --- kills ----------------------------------------------------------------------------------------------------------

# enough candidates that a kill comes in the middle
LONG = ["search.population=400", "search.mutations=10", "search.crossovers=10", "search.iterations=3",
        "search.samples=3", "eval.tokens=512"]  # fmt: skip


def command(runs: Path, run: RunDir) -> list[str]:
    return ["search", "longrope", run.name, "--ctx", "128", *LONG, f"runs_dir={runs}", "--json"]


@pytest.fixture(scope="module")
def uninterrupted(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was searched in one go."""
    run = run_of(lab, "rope")
    folder = tmp_path_factory.mktemp("whole") / run.name
    copy_run(run, folder)
    done = ropelab(*command(folder.parent, run))
    assert done.status == 0, done.err
    return folder


def copy_run(run: RunDir, folder: Path) -> None:
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("searches", "results"))


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_search_goes_on_to_the_same_result(
    lab: Path, uninterrupted: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    """A real process, killed when some candidates are scored, and the same command again: the result file is that of a
    search that was never interrupted, byte for byte, and nothing that was on the disk was scored again."""
    run = run_of(lab, "rope")
    cut = tmp_path / run.name
    copy_run(run, cut)
    process = Process(cli.main, *command(tmp_path, run))
    folder = cut / "searches"
    waited_for(lambda: any(folder.glob("*/state.json")), process)
    process.send_signal(signum)
    _, errors = process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    if signum != signal.SIGKILL:
        (line,) = [line for line in errors.splitlines() if "the same command goes on from there" in line]
        assert line.startswith(("ropelab: the search of ", "ropelab: the random search of "))
    assert not list(folder.glob("*/result.json"))
    (state,) = folder.glob("*/state.json")
    known = len(json.loads(state.read_bytes())["long"])

    again = ropelab(*command(tmp_path, run))
    assert again.status == 0, again.err
    resumed = json.loads(again.out)
    assert 0 < resumed["scored"] == 2 * resumed["search"]["evaluations"] - known
    (mine,), (theirs,) = (list(path.glob("searches/*/result.json")) for path in (cut, uninterrupted))
    assert mine.read_bytes() == theirs.read_bytes()
    assert not list(folder.glob("*/.*"))


def test_a_full_disk_is_named_and_loses_nothing(lab: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """No file may pass 2 kB: one line with the file, no half-written one; then the search as if nothing had been."""
    run = run_of(lab, "rope")
    full = tmp_path / run.name
    copy_run(run, full)

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        failed = ropelab(*command(tmp_path, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert failed.status == 1
    line = failed.err.splitlines()[-1]
    assert "File too large" in line
    assert str(full / "searches") in line
    assert "Traceback" not in failed.err
    assert not list(full.glob("searches/*/.*"))
    assert ropelab(*command(tmp_path, run)).status == 0
    (mine,), (theirs,) = (list(path.glob("searches/*/result.json")) for path in (full, uninterrupted))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_damaged_state_is_searched_again(lab: Path, searched: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(lab, "rope")
    shutil.copytree(run.path, tmp_path / "runs" / run.name)
    (state,) = (tmp_path / "runs" / run.name).glob(f"searches/longrope-{searched['search']['digest'][:16]}/state.json")
    for damage in (b'{"long": [[1', b'{"long": [[1, 2]]}', b"[]", b'{"long": 3}'):
        state.write_bytes(damage)
        again = as_json("search", "longrope", run.name, "--ctx", 128, "--short", *SMALL, "eval.tokens=512",
                        f"runs_dir={tmp_path / 'runs'}")  # fmt: skip
        assert again["scored"] == searched["scored"]
        assert again["long_factors"] == searched["long_factors"]


# --- mistakes -------------------------------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(f"{path} {path.stat().st_mtime_ns}" for path in folder.rglob("*") if path.name != "lock")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ALIBI", "--ctx", "128"], ["pos=rope", "has pos=alibi"]),
        (["ROPE", "--ctx", "100000"], ["validation text cannot fill --ctx 100000", "use --ctx "]),
        (["ROPE", "--ctx", "128", "search.samples=1000"], ["windows of 128 tokens, not search.samples=1000"]),
        (["ROPE", "--ctx", "32"], ["--ctx 32 is no extension", "--ctx 256"]),
        (["ROPE"], ["give --ctx N"]),
        (["ROPE", "--ctx", "64,128"], ["--ctx takes one number here, not '64,128'"]),
        (["ROPE", "--ctx", "64", "--ctx", "128"], ["eval.ctx", "once"]),
        (["ROPE", "--ctx", "128", "--factor", "1"], ["--factor must be a number above 1"]),
        (["ROPE", "--ctx", "128", "--factor", "auto"], ["--factor takes one number here, not 'auto'"]),
        (["ROPE", "--ctx", "128", "--factor", "nan"], ["--factor must be a number above 1"]),
        (["ROPE", "--ctx", "128", "search.populaton=4"], ["search.populaton", "did you mean search.population?"]),
        (["ROPE", "--ctx", "128", "search.population=few"], ["search.population takes a whole number, not 'few'"]),
        (["ROPE", "--ctx", "128", "search.population=1"], ["search.population must be from 2 to 1000000"]),
        (["ROPE", "--ctx", "128", "search.start_tokens=4"], ["search.start_tokens takes a list"]),
        (["ROPE", "--ctx", "128", "search.step=0.1", "search.step=0.2"], ["search.step is given twice"]),
        (["ROPE", "--ctx", "128", "train.lr=1"], ["search does not take train.lr=1"]),
        (["ROPE", "--ctx", "128", "eval.protocol=prefix"], ["search does not take eval.protocol=prefix"]),
        (["ROPE", "ALIBI", "--ctx", "128"], ["one RUN, not 2"]),
        (["ROPE", "--ctx", "128", "-o", "FOLDER"], ["is a folder"]),
        (["no-such-run", "--ctx", "128"], ["there is no run 'no-such-run'"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(lab: Path, arguments: list[str], says: list[str]) -> None:
    words = {"ROPE": run_of(lab, "rope").name, "ALIBI": run_of(lab, "alibi").name, "FOLDER": str(lab)}
    before = listing(lab)
    line = mistake("search", "longrope", *(words.get(item, item) for item in arguments))
    for part in says:
        assert part in line
    assert listing(lab) == before


def test_the_largest_ctx_that_it_names_works(lab: Path) -> None:
    """The length in the message about text that cannot fill ctx is searched, and one more token is refused again."""
    run = run_of(lab, "rope").name
    settings = [*(item for item in SMALL if not item.startswith("search.samples")), "search.samples=1"]
    message = invoke("search", "longrope", run, "--ctx", "100000", *settings).stderr
    largest = int(message.partition("use --ctx ")[2].split()[0])
    done = invoke("search", "longrope", run, "--ctx", largest, *settings)
    if done.exit_code:  # the test text is the shorter one: it is named the same way
        largest = int(done.stderr.partition("use --ctx ")[2].split()[0])
        done = invoke("search", "longrope", run, "--ctx", largest, *settings)
    assert done.exit_code == 0, done.stderr
    again = invoke("search", "longrope", run, "--ctx", largest + 1, *settings)
    assert again.exit_code == 2
    assert "cannot fill" in again.stderr


def test_only_longrope_is_searched() -> None:
    done = invoke("search", "yarn", "some-run", "--ctx", "128")
    assert done.exit_code == 2
    assert "search takes longrope, not 'yarn'" in done.stderr


def test_one_writer_at_a_time(lab: Path) -> None:
    with run_of(lab, "rope").locked():
        done = invoke("search", "longrope", run_of(lab, "rope").name, "--ctx", 128, *SMALL, "seed=7")
    assert done.exit_code == 2
    assert "another process" in done.stderr
