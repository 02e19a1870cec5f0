"""Checkpoints as they are found: scored as transformers loads them, from their own files, or refused in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, processors

from ropelab import config, data
from ropelab.data import fast
from ropelab.evaluation import check_no_bos
from ropelab.huggingface import checkpoint, rotary
from ropelab.huggingface.model import layer_words
from ropelab.sweeps.plan import questions
from tests.test_huggingface import CTX, GROUPED, SMALL, good, invoke, save

pytestmark = pytest.mark.integration

T = transformers
TEXTS = (
    "the quick brown fox jumps over the lazy dog. ",
    "pack my box with five dozen liquor jugs, ",
    "sphinx of quartz ",
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CTX, "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three documents in text/."""
    folder = tmp_path_factory.mktemp("wild")
    (folder / "text").mkdir()
    for number, words in enumerate(TEXTS):
        (folder / "text" / f"{number}.txt").write_text((words + str(number)) * 12)
    return folder


@pytest.fixture(scope="module")
def llama(base: Path) -> Path:
    return save(base / "llama", T.LlamaConfig(**GROUPED))


def settings(base: Path, ctx: str = f"{CTX},{2 * CTX}") -> tuple[str, ...]:
    return (
        "--ctx", ctx, "--protocol", "prefix", "--json", "data=text", f"data.path={base / 'text'}", "device=cpu",
        f"runs_dir={base / 'runs'}", f"cache_dir={base / 'cache'}",
    )  # fmt: skip


def evaluated(folder: Path, base: Path, *more: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(good("eval", "--hf", folder, *settings(base), *more).stdout)
    return found


def refused(*arguments: object) -> str:
    """The one line that a mistake is told, after that of the memory where the weights had to be read to find it."""
    done = invoke(*arguments)
    assert done.exit_code == 2, f"{arguments}: {done.exit_code} {done.output} {done.exception!r}"
    (line,) = [line for line in done.stderr.strip().splitlines() if not line.startswith("memory:")]
    assert line.startswith("ropelab: ")
    return line


def changed(folder: Path, to: Path, **values: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json; None takes a key away."""
    shutil.copytree(folder, to, symlinks=True)
    raw = json.loads((to / "config.json").read_text()) | values
    (to / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return to


def other_weights(folder: Path, to: Path) -> None:
    state = {name: tensor.flip(0) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, to, metadata={"format": "pt"})


@torch.no_grad()
def native(model: Any, ids_of: Any, base: Path, ctx: int) -> float:
    """Mean loss of transformers' own forward over the first ctx tokens of each document."""
    total, count = 0.0, 0
    for path in sorted((base / "text").iterdir()):
        ids = torch.tensor([ids_of(path.read_text())[: ctx + 1]])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ctx
    return total / count


def plain(folder: Path, base: Path, ctx: int, change: Any = lambda found: None) -> float:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = T.AutoConfig.from_pretrained(folder)
    change(found)
    model = T.AutoModelForCausalLM.from_pretrained(folder, config=found, dtype=torch.float32).eval()
    return native(model, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, base, ctx)


def agrees(found: dict[str, Any], folder: Path, base: Path, change: Any = lambda found: None) -> None:
    for row in found["rows"]:
        assert row["nll"] == pytest.approx(plain(folder, base, row["ctx"], change), abs=1e-5)


# --- no scaling asked for: as transformers does -----------------------------------------------------------------------


def families() -> dict[str, Any]:
    """Configurations whose rotation is no formula of ours, or whose names are as published."""
    moe = {"num_local_experts": 2, "num_experts_per_tok": 1}
    long = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": CTX}
    return {
        "equal betas": T.LlamaConfig(**GROUPED, rope_parameters={**YARN, "beta_fast": 1.0, "beta_slow": 1.0}),
        "factors below 1": T.LlamaConfig(
            **GROUPED, rope_parameters={**long, "factor": 4.0, "long_factor": [0.9, 1.5, 2.0, 3.0],
                                        "short_factor": [0.99, 1.0, 1.0, 1.1]},
        ),
        "two mscales": T.PhimoeConfig(
            **GROUPED, **moe, pad_token_id=0,
            rope_parameters={**long, "factor": 4.0, "long_factor": [1.0, 1.5, 2.0, 3.0],
                             "short_factor": [1.0, 1.0, 1.0, 1.1], "long_mscale": 1.3, "short_mscale": 1.1},
        ),
        "alpha": T.HunYuanDenseV1Config(
            **GROUPED, head_dim=8, pad_token_id=0,
            rope_parameters={"rope_type": "dynamic", "factor": 1.0, "alpha": 100.0, "rope_theta": 10000.0},
        ),
        "odd dimension": T.GPTNeoXConfig(**{**SMALL, "hidden_size": 40}, rotary_pct=0.7),
    }  # fmt: skip


@pytest.mark.parametrize("name", families())
def test_a_rotation_that_is_no_formula_of_ours_is_scored_as_transformers_does(
    name: str, base: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "checkpoint", families()[name])
    found = evaluated(folder, base)
    agrees(found, folder, base)
    assert found["scaling"] == ("none" if name == "odd dimension" else "own")
    assert "as transformers turns it" in found["warnings"][0]
    if name == "odd dimension":  # only what we are asked to change and cannot is refused
        line = refused("eval", "--hf", folder, *settings(base), "--scaling", "linear", "--factor", "2")
        assert "does not turn as RoPE does" in line
        agrees(evaluated(folder, base, "--scaling", "none"), folder, base)
    if name == "equal betas":  # replaced as any other
        linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        agrees(
            evaluated(folder, base, "--scaling", "linear", "--factor", "4"), folder, base,
            lambda found: setattr(found, "rope_parameters", linear),
        )  # fmt: skip


def test_a_base_for_each_layer(base: Path, tmp_path: Path) -> None:
    if not hasattr(T, "GraniteSWAConfig"):
        pytest.skip("transformers has no such model")
    found = T.GraniteSWAConfig(
        **GROUPED, pad_token_id=0, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        layer_rope_theta=[10000.0, 1000000.0], rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    folder = save(tmp_path / "checkpoint", found)
    agrees(evaluated(folder, base), folder, base)
    assert "turn differently" in refused("eval", "--hf", folder, *settings(base), "--scaling", "linear")


def test_without_the_scaling_keys_of_the_model_itself_stay(base: Path, tmp_path: Path) -> None:
    if not hasattr(T, "Ministral3Config"):
        pytest.skip("transformers has no such model")
    own = {**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5, "beta_fast": 32.0,
           "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    folder = save(tmp_path / "checkpoint", T.Ministral3Config(**GROUPED, head_dim=8, rope_parameters=own))

    def without(found: Any) -> None:
        kept = ("rope_theta", "original_max_position_embeddings", "llama_4_scaling_beta")
        found.rope_parameters = {"rope_type": "default", **{key: own[key] for key in kept}}

    agrees(evaluated(folder, base), folder, base)
    agrees(evaluated(folder, base, "--scaling", "none"), folder, base, without)


def test_names_as_published_are_taken(llama: Path, base: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("LLaMAForCausalLM", "LlamaForCausalLM")):
        folder = changed(llama, tmp_path / str(number), architectures=[name])
        agrees(evaluated(folder, base), folder, base)
    folder = changed(llama, tmp_path / "other", architectures=["LlamaForSequenceClassification"])
    assert "no causal language model" in refused("eval", "--hf", folder, *settings(base))


# --- what reaches the scores ------------------------------------------------------------------------------------------


def test_a_rotary_module_that_nothing_reads_takes_no_scaling(base: Path, tmp_path: Path) -> None:
    falcon = T.FalconConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False,
        new_decoder_architecture=False, parallel_attn=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    folder = save(tmp_path / "falcon", falcon)
    found = evaluated(folder, base)
    assert found["pos"] == "alibi"
    agrees(found, folder, base)
    line = refused("eval", "--hf", folder, *settings(base), "--scaling", "linear", "--factor", "4")
    assert "needs a rotary model" in line
    smol = T.SmolLM3Config(**GROUPED, pad_token_id=0, no_rope_layers=[0, 0])
    folder = save(tmp_path / "smol", smol)
    found = evaluated(folder, base)
    agrees(found, folder, base)
    assert "reaches no layer" in found["warnings"][0]
    line = refused("eval", "--hf", folder, *settings(base), "--scaling", "linear", "--factor", "4")
    assert "no layer reads it" in line


def test_a_scaling_says_which_layers_it_reaches(base: Path, llama: Path, tmp_path: Path) -> None:
    cohere = T.Cohere2Config(
        **{**GROUPED, "num_hidden_layers": 3}, head_dim=8, pad_token_id=0, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    folder = save(tmp_path / "cohere", cohere)
    done = good("eval", "--hf", folder, *settings(base), "--scaling", "linear", "--factor", "4")
    words = "layers 0 to 1 of 3 (sliding_attention)"
    assert [row["layers"] for row in json.loads(done.stdout)["rows"]] == [words] * 2
    assert f"scaling=linear reaches {words}" in done.stderr
    assert "layers" not in evaluated(folder, base)["rows"][0]
    assert "layers" not in evaluated(llama, base, "--scaling", "linear", "--factor", "4")["rows"][0]
    assert layer_words([True, False, True, True], None) == "layers 0, 2 to 3 of 4"


def test_a_number_of_config_json_that_is_not_heeded_is_named(base: Path, tmp_path: Path) -> None:
    dbrx = T.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=CTX, vocab_size=256, tie_word_embeddings=False,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    )  # fmt: skip
    folder = save(tmp_path / "dbrx", dbrx)
    assert "warnings" not in evaluated(folder, base)
    raw = json.loads((folder / "config.json").read_text())
    raw["attn_config"]["rope_theta"] = 500000
    (folder / "config.json").write_text(json.dumps(raw))
    done = good("eval", "--hf", folder, *settings(base))
    (line,) = json.loads(done.stdout)["warnings"]
    assert "attn_config.rope_theta = 500000" in line
    assert line.endswith("has 10000")
    assert line in done.stderr
    assert line in good("eval", "--hf", folder, *settings(base)).stderr  # of a stored one too


def test_numbers_that_are_heeded_are_not_named(base: Path, tmp_path: Path) -> None:
    """Several bases, shares of the head, nested and older forms of scalings."""
    made = {
        "gemma3": T.Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=16, pad_token_id=0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "gpt_neox": T.GPTNeoXConfig(**SMALL, rotary_pct=0.5),
        "yarn": T.LlamaConfig(**GROUPED, rope_parameters=YARN),
    }  # fmt: skip
    for name, one in made.items():
        assert "warnings" not in evaluated(save(tmp_path / name, one), base), name
    raw = json.loads((tmp_path / "yarn" / "config.json").read_text())
    raw["attn_config"] = {"rope_scaling": {"type": "linear", "factor": 16.0}}
    (tmp_path / "yarn" / "config.json").write_text(json.dumps(raw))
    (line,) = evaluated(tmp_path / "yarn", base)["warnings"]
    assert "attn_config.rope_scaling.factor = 16" in line


# --- the files of the digest and no others ----------------------------------------------------------------------------


def test_the_file_that_config_json_names_is_the_one_of_the_digest(llama: Path, base: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "named", transformers_weights="other.safetensors")
    other_weights(folder, folder / "other.safetensors")
    found = evaluated(folder, base)
    swapped = changed(llama, tmp_path / "swapped")
    other_weights(llama, swapped / "model.safetensors")
    agrees(found, swapped, base)
    before = checkpoint.digest(folder)
    (folder / "model.safetensors").unlink()
    assert checkpoint.digest(folder) == before
    shutil.copy(llama / "model.safetensors", folder / "other.safetensors")
    assert checkpoint.digest(folder) != before
    away = changed(llama, tmp_path / "away", transformers_weights="../llama/model.safetensors")
    assert "only plain names" in refused("eval", "--hf", away, *settings(base))


def test_other_files_that_transformers_would_take_are_left(llama: Path, base: Path, tmp_path: Path) -> None:
    """A second configuration, kernels to fetch, code to run."""
    folder = changed(
        llama, tmp_path / "led", configuration_files=["config.4.0.0.json"], _attn_implementation="someone/kernel",
        auto_map={"AutoModelForCausalLM": "modeling_own.Own"},
    )  # fmt: skip
    raw = json.loads((llama / "config.json").read_text())
    (folder / "config.4.0.0.json").write_text(json.dumps({**raw, "rms_norm_eps": 0.5}))
    (folder / "modeling_own.py").write_text("raise SystemExit('executed')")
    agrees(evaluated(folder, base), llama, base)


def sharded(folder: Path, to: Path, name: str) -> Path:
    """A checkpoint in two files, one of which the index calls `name`."""
    changed(folder, to)
    state = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(state)
    one, two = {key: state[key] for key in names[:5]}, {key: state[key] for key in names[5:]}
    save_file(one, to / "one.safetensors", metadata={"format": "pt"})
    save_file(two, to / "two.safetensors", metadata={"format": "pt"})
    weight_map = {**dict.fromkeys(one, "one.safetensors"), **dict.fromkeys(two, name)}
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return to


def test_an_index_names_plain_files_of_the_folder(llama: Path, base: Path, tmp_path: Path) -> None:
    folder = sharded(llama, tmp_path / "right", "two.safetensors")
    agrees(evaluated(folder, base), llama, base)
    away = sharded(llama, tmp_path / "away", "../outside/two.safetensors")
    (tmp_path / "outside").mkdir()
    shutil.move(away / "two.safetensors", tmp_path / "outside" / "two.safetensors")
    assert "only plain names" in refused("eval", "--hf", away, *settings(base))
    for value in ([], {"a": 1}, "x"):
        (away / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
        assert "ropelab: " in refused("eval", "--hf", away, *settings(base))
    shutil.copy(folder / "one.safetensors", folder / "three.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "three.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "in two of its files" in refused("eval", "--hf", folder, *settings(base))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_and_a_snapshot_is_not(
    name: str, llama: Path, base: Path, tmp_path: Path
) -> None:
    away = changed(llama, tmp_path / "away")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(away / name, tmp_path / "elsewhere" / name)
    (away / name).symlink_to(tmp_path / "elsewhere" / name)
    assert "is a link out of its folder" in refused("eval", "--hf", away, *settings(base))
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    shutil.copytree(llama, snapshot)
    digest = hashlib.sha256((snapshot / name).read_bytes()).hexdigest()
    shutil.move(snapshot / name, repository / "blobs" / digest)
    (snapshot / name).symlink_to(Path("../../blobs") / digest)
    if name == "model.safetensors":
        agrees(evaluated(snapshot, base), llama, base)
    else:
        assert checkpoint.own_file(snapshot, name) == snapshot / name


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter(folder: Path, llama: Path, **values: Any) -> Path:
    """A LoRA adapter that PEFT itself wrote, and the model with it merged beside it."""
    peft = pytest.importorskip("peft")
    model = T.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    torch.manual_seed(1)
    plan = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], **values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks by a name that transformers is about to change
        made = peft.get_peft_model(model, plan)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    made.save_pretrained(folder)
    made.merge_and_unload().save_pretrained(folder / "merged")
    shutil.copy(llama / "tokenizer.json", folder / "merged" / "tokenizer.json")
    return folder


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_is_added_when_asked_for_and_is_part_of_the_digest(
    stabilised: bool, llama: Path, base: Path, tmp_path: Path
) -> None:
    made = adapter(tmp_path / "adapter", llama, use_rslora=stabilised)
    both = changed(llama, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(made / name, both / name)
    without, added = evaluated(both, base), evaluated(both, base, "--adapter", both)
    agrees(without, llama, base)
    assert "the adapter beside the weights is not applied" in without["warnings"][0]
    agrees(added, made / "merged", base)
    assert added["checkpoint"] != without["checkpoint"]
    assert added["run"] != without["run"]
    assert "warnings" not in added
    assert evaluated(llama, base, "--adapter", made)["rows"] == added["rows"]
    assert "is an adapter; give the model" in refused("eval", "--hf", made, *settings(base))


def test_what_is_more_than_plain_lora_is_refused(llama: Path, base: Path, tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", llama)
    said = json.loads((made / "adapter_config.json").read_text())
    refuse = ("eval", "--hf", llama, "--adapter", made, *settings(base))
    for changes, reason in (
        ({"use_dora": True}, "more than plain LoRA"), ({"peft_type": "IA3"}, "more than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "more than plain LoRA"), ({"r": 3}, "has not the rank 3"),
        ({"r": "x"}, "lacks r"), ({"lora_alpha": None}, "lacks r"), ({"r": 10**400}, "401 digits"),
    ):  # fmt: skip
        (made / "adapter_config.json").write_text(json.dumps({**said, **changes}))
        assert reason in refused(*refuse)
    (made / "adapter_config.json").write_text(json.dumps(said))
    state = load_file(made / "adapter_model.safetensors")
    save_file({name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in state.items()},
              made / "adapter_model.safetensors")  # fmt: skip
    assert "is for another model" in refused(*refuse)
    (made / "adapter_model.safetensors").write_bytes(b"x")
    assert "is damaged" in refused(*refuse)
    assert "give one --hf" in refused("eval", "--hf", llama, "--hf", llama, "--adapter", made, *settings(base))


# --- tokenisers -------------------------------------------------------------------------------------------------------


def with_tokens(*contents: str, template: bool = False) -> dict[str, Any]:
    """The byte tokeniser with special tokens after its 256; template: the first is put before every text."""
    made = Tokenizer.from_str(json.dumps(data.to_json(data.Bytes())))
    made.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in contents])
    if template:
        made.post_processor = processors.TemplateProcessing(
            single=f"{contents[0]} $A", pair=f"{contents[0]} $A $B", special_tokens=[(contents[0], 256)]
        )
    found: dict[str, Any] = json.loads(made.to_str())
    return found


def test_a_literal_end_of_text_is_the_token_that_the_checkpoint_has(base: Path, tmp_path: Path) -> None:
    folder = save(
        tmp_path / "checkpoint", T.LlamaConfig(**{**GROUPED, "vocab_size": 257}), tokenizer=with_tokens("<|endoftext|>")
    )
    text = tmp_path / "base" / "text"
    text.mkdir(parents=True)
    (text / "a.txt").write_text("one document<|endoftext|>and another. " * 20)
    found = evaluated(folder, tmp_path / "base")
    agrees(found, folder, tmp_path / "base")
    own = data.from_json(json.loads((folder / "tokenizer.json").read_text()), 257)
    assert 256 in own.encode("a<|endoftext|>b").tolist()


def test_an_id_past_the_table_is_refused_where_it_occurs(base: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoint", T.LlamaConfig(**GROUPED), tokenizer=with_tokens("<image>"))
    agrees(evaluated(folder, base), folder, base)
    text = tmp_path / "other" / "text"
    text.mkdir(parents=True)
    (text / "a.txt").write_text("a picture <image> here. " * 20)
    line = refused("eval", "--hf", folder, *settings(tmp_path / "other"))
    assert "'<image>', of id 256, and the model has rows for 256" in line


HOSTILE: dict[str, Any] = {
    "no vocabulary": {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
    "no model": {"model": None},
    "a list for the model": {"model": []},
    "a list for the vocabulary": {"model": {"type": "BPE", "vocab": [1], "merges": []}},
    "words for ids": {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
    "a number for the tokens": {"added_tokens": 5},
    "a list for a pre-tokeniser": {"pre_tokenizer": []},
    "huge ids": {"model": {"type": "BPE", "vocab": {"a": 10**400}, "merges": []}},
    "ids of 4e9": {"model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}},
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_tokenizer_json_that_is_none_is_refused_in_a_line(kind: str, llama: Path, base: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "checkpoint")
    source = {**json.loads((folder / "tokenizer.json").read_text()), **copy.deepcopy(HOSTILE[kind])}
    (folder / "tokenizer.json").write_text(json.dumps(source))
    assert "tokenizer.json" in refused("eval", "--hf", folder, *settings(base))


def replaced(pattern: dict[str, str], content: str, times: int = 1) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": pattern, "content": content}] * times
    return {"normalizer": {"type": "Sequence", "normalizers": steps}}


def split(pattern: str) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


BYTE_STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ENDLESS: dict[str, dict[str, Any]] = {
    "doubled 40 times": replaced({"String": "a"}, "aa", 40),
    "a page for a letter": replaced({"String": "a"}, "b" * 1000),
    "doubled as it is decoded": {"decoder": {
        "type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
    }, "added_tokens": [
        {"id": 0, "content": "!", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True},
    ]},
    "doubled as it is loaded": {**replaced({"String": "a"}, "aa", 40), "added_tokens": [
        {"id": 0, "content": "a!", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
         "special": False},
    ]},
    "a page between letters": replaced({"Regex": ""}, "b" * 1000),
    "bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_STEP] * 40}},
    "a quantifier in a quantifier": split(r"([a-j ]+)+\d\d\d"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_tokenizer_json_without_an_end_is_refused_in_a_line(
    kind: str, llama: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "TRIAL_SECONDS", 1)
    folder = changed(llama, tmp_path / "checkpoint")
    source = {**json.loads((folder / "tokenizer.json").read_text()), **copy.deepcopy(ENDLESS[kind])}
    (folder / "tokenizer.json").write_text(json.dumps(source))
    line = refused("eval", "--hf", folder, *settings(base))
    assert "damaged or hostile" in line


def test_steps_that_published_tokenisers_have_pass_the_trial() -> None:
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    prepended = replaced({"String": " "}, "▁")
    prepended["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "▁"})
    for change in (split(llama3), prepended, {"normalizer": {"type": "NFKD"}}):
        own = data.from_json({**with_tokens("<x>"), **change}, 300)
        assert own.encode("a text").size


def test_a_panic_beneath_a_tokeniser_is_one_line() -> None:
    own = fast.Fast({**with_tokens("<x>"), **split(r"([a-j ]+)+\d\d\d")}, 300)  # without its trial
    with pytest.raises(ValueError, match="fails on this text"):
        own.encode("abcdefghij" * 4)


def test_a_tokeniser_of_a_run_with_endless_rows_is_refused(tmp_path: Path) -> None:
    source = with_tokens("<x>")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"name": "fast", "source": source, "rows": 10**12}))
    with pytest.raises(ValueError, match="is no tokeniser"):
        data.load_tokenizer(tmp_path / "tokenizer.json")


# --- numbers that no model has ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"model_type": {}}, "names no model_type"),
        ({"max_position_embeddings": 10**400}, "a number of 401 digits"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "a number of 401 digits"),
        ({"num_hidden_layers": 100_000}, "asks for 100000 layers"),
        ({"num_hidden_layers": 10**12}, "asks for 1000000000000 layers"),
        ({"num_mtp_layers": 10**12}, "no model has so many layers"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**12]]}, "attention_types 1000000000000"),
        ({"hidden_size": 2**30}, ""),
        ({"vocab_size": 2**50}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"num_attention_heads": "four"}, ""),
        ({"hidden_size": []}, ""),
        ({"max_position_embeddings": -3}, ""),
        ({"max_position_embeddings": {}}, ""),
        ({"rope_parameters": 5}, ""),
        ({"rope_parameters": []}, ""),
    ],
)
def test_a_configuration_that_no_model_has_is_refused_in_a_line(
    values: dict[str, Any], reason: str, llama: Path, base: Path, tmp_path: Path
) -> None:
    line = refused("eval", "--hf", changed(llama, tmp_path / "checkpoint", **values), *settings(base))
    assert reason in line


@pytest.mark.parametrize("values", [{"num_labels": 10**12}, {"id2label": {"0": "a"}, "num_labels": 10**12}])
def test_the_labels_of_a_classifier_are_not_built(
    values: dict[str, Any], llama: Path, base: Path, tmp_path: Path
) -> None:
    folder = changed(llama, tmp_path / "checkpoint", **values)
    assert checkpoint.read_config(folder).num_labels == 2  # transformers' default
    assert evaluated(folder, base)["rows"][0]["nll"] == evaluated(llama, base)["rows"][0]["nll"]


@pytest.mark.parametrize(("rows", "prefixed"), [(10**9, True), (10**9, False), (4 * 10**7, True)])
def test_tables_that_the_weights_do_not_fill_are_refused_before_memory_is_taken(
    rows: int, prefixed: bool, base: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "gpt2", T.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    if not prefixed:  # as the files of GPT-2 itself are
        state = load_file(folder / "model.safetensors")
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads(good("eval", "--hf", folder, *settings(base, str(CTX))).stdout)
    agrees(found, folder, base)
    line = refused("eval", "--hf", changed(folder, tmp_path / "other", n_positions=rows), *settings(base, str(CTX)))
    assert f"wpe.weight than its config.json asks for: (64, 16), not ({rows}, 16)" in line


def test_a_model_far_larger_than_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    found = T.GPTJConfig(vocab_size=256, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=64)
    folder = changed(save(tmp_path / "gptj", found), tmp_path / "other", n_positions=10**9)  # a table of angles
    assert "asks for a model of" in refused("eval", "--hf", folder, *settings(base))


def test_a_tokeniser_of_other_files_is_made_apart_and_in_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "checkpoint", T.GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    rows = evaluated(folder, base)["rows"]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    found = evaluated(folder, base)
    assert [row["nll"] for row in found["rows"]] == [row["nll"] for row in rows]
    monkeypatch.setattr(checkpoint, "CONVERTING_SECONDS", 0.01)
    assert "none can be made of its files (not in 0.01 seconds)" in refused("eval", "--hf", folder, *settings(base))


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(llama: Path, base: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert "has no tokenizer.json" in refused("eval", "--hf", folder, *settings(base))


# --- the beginning of a text ------------------------------------------------------------------------------------------


def test_bos_stands_in_the_place_of_each_windows_first_token(base: Path, tmp_path: Path) -> None:
    source = with_tokens("<s>", template=True)
    folder = save(tmp_path / "checkpoint", T.LlamaConfig(**{**GROUPED, "vocab_size": 257}), tokenizer=source)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def begun(text: str) -> list[int]:
        return [256, *tokenizer.encode(text, add_special_tokens=False).ids[1:]]

    false, true, auto = (evaluated(folder, base, f"eval.bos={word}") for word in ("false", "true", "auto"))
    assert evaluated(folder, base) == false
    assert true == auto
    assert (false["protocol"]["bos"], true["protocol"]["bos"]) == (None, 256)
    for one, other in zip(false["rows"], true["rows"], strict=True):
        assert other["nll"] == pytest.approx(native(model, begun, base, other["ctx"]), abs=1e-5)
        assert abs(one["nll"] - other["nll"]) > 1e-4
        for key in ("tokens", "documents", "targets_digest"):
            assert one[key] == other[key]
    # every window, not every document: a window of the second half begins with it too
    how = ("--protocol", "nonoverlapping", "eval.bos=true")
    shown = [item for item in settings(base, f"{CTX},") if item not in ("--protocol", "prefix")]
    row = json.loads(good("eval", "--hf", folder, *shown, *how).stdout)["rows"][0]
    total = count = 0.0
    for path in sorted((base / "text").iterdir()):
        ids = tokenizer.encode(path.read_text(), add_special_tokens=False).ids
        for start in range(0, (len(ids) - 1) // CTX * CTX, CTX):
            with torch.no_grad():
                logits = model(torch.tensor([[256, *ids[start + 1 : start + CTX]]])).logits[0].double()
            due = torch.tensor(ids[start + 1 : start + CTX + 1])
            total += torch.nn.functional.cross_entropy(logits, due, reduction="sum").item()
            count += CTX
    assert row["tokens"] == count
    assert row["nll"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize(
    ("template", "said", "usual"),
    [
        (True, {}, 256), (False, {}, None), (True, {"add_bos_token": False}, None),
        (False, {"add_bos_token": True, "bos_token": "<s>"}, 256),
        (False, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, 256),
        (False, {"bos_token": "<s>"}, None),
    ],
)  # fmt: skip
def test_auto_is_what_the_tokeniser_does(
    template: bool, said: dict[str, Any], usual: int | None, llama: Path, tmp_path: Path
) -> None:
    folder = changed(llama, tmp_path / "checkpoint")
    (folder / "tokenizer.json").write_text(json.dumps(with_tokens("<s>", template=template)))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = checkpoint.read_tokenizer(folder, 257)
    found = checkpoint.beginning(folder, tokenizer)
    assert (found.token if found.usual else None) == usual
    assert found.token == (256 if template or "bos_token" in said else None)


def test_without_such_a_token_it_is_refused(llama: Path, base: Path) -> None:
    assert "names no beginning-of-text token" in refused("eval", "--hf", llama, *settings(base), "eval.bos=true")
    assert evaluated(llama, base, "eval.bos=auto")["protocol"]["bos"] is None
    assert "eval.bos must be one of false, true, auto" in refused("eval", "--hf", llama, "eval.bos=yes")


def test_a_run_of_ours_has_no_such_token_and_a_sweep_says_nothing_of_it() -> None:
    with pytest.raises(ValueError, match=r"eval\.bos=true: a run of ours was trained without"):
        check_no_bos("true")
    check_no_bos("auto")
    (question,) = questions(config.load([]))
    assert "bos" not in question["eval"]  # the digest of a sweep is what it was
    (question,) = questions(config.load(["eval.bos=auto"]))
    assert question["eval"]["bos"] == "auto"
    stored = config.to_dict(config.load([]))
    del stored["eval"]["bos"]
    assert config.from_dict(stored).eval.bos == "false"


def test_walk_finds_what_stands_anywhere() -> None:
    found = list(rotary.walk({"a": [1, {"b": 2.5}], "c": {"d": None}, "e": []}))
    assert found == [(("a",), 1), (("a", "b"), 2.5), (("c", "d"), None)]
