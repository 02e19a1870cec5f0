"""The model card of an exported run: README.md, as the hub shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ropelab.config import Method
from ropelab.evaluation import EvalResult


def model_card(
    name: str,
    manifest: Mapping[str, Any],
    scaling: Method,
    config: Mapping[str, Any],
    parity: Mapping[str, Any],
    evaluations: Sequence[EvalResult],
) -> str:
    """Markdown with the run's manifest, the parity report and all stored results with their protocols."""
    trained = manifest["config"]
    extended = scaling.name if scaling.name == "none" else f"{scaling.name} {_parameters(scaling)}"
    facts = {
        "position encoding": _method(trained["pos"]),
        "scaling of this export": extended,
        "scaling in training": _method(trained["scaling"]),
        "training length": f"{trained['train']['ctx']} tokens (formulas refer to {manifest['original_ctx']})",
        "layers, heads, width": ", ".join(str(trained["model"][key]) for key in ("n_layer", "n_head", "d_model")),
        "parameters": manifest.get("params"),
        "tokeniser": f"{manifest['tokenizer']['name']}, {config['vocab_size']} tokens",
        "text": f"{manifest['corpus']['name']}, digest {manifest['corpus']['digest'][:16]}",
        "steps, batch, learning rate": ", ".join(str(trained["train"][key]) for key in ("steps", "batch_size", "lr")),
        "seed": trained["seed"],
        "validation loss": manifest.get("val_nll"),
        "digest of the run": manifest["digest"][:16],
        "made with": ", ".join(f"{key} {manifest['environment'][key]}" for key in ("ropelab", "torch")),
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [ropelab, position-encoding, length-extrapolation]",
        "---",
        "",
        f"# {name}",
        "",
        f"A small language model trained with ropelab, as `{config['architectures'][0]}`. It predicts text and follows",
        "no instructions.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")',
        "```",
        "",
        "## The run",
        "",
        *_table(("", ""), facts.items()),
        "",
        "The separator between joined training documents is no token of this model: it was never predicted. Its input",
        "row is in `ropelab/rest.safetensors`, the whole manifest in `ropelab/run.json`.",
        "",
        "## Parity",
        "",
        f"The same text through ropelab {parity['ropelab']} and transformers {parity['transformers']}, fp32:",
        "",
        *_table(
            ("tokens", "x training length", "largest logit difference", "relative", "loss (nats)", "loss difference"),
            (
                (
                    row["ctx"], row["times"], f"{row['logits_difference']:.2e}", f"{row['logits_relative']:.2e}",
                    f"{row['nll']:.4f}", f"{row['nll_difference']:.2e}",
                )
                for row in parity["rows"]
            ),
        ),
        "",
        "## Results",
        "",
    ]  # fmt: skip
    rows = [row for item in evaluations for row in _result_rows(item)]
    if not rows:
        return "\n".join([*lines, "None is stored. `ropelab eval RUN` makes them.", ""])
    head = ("protocol", "text", "scaling", "tokens", "perplexity", "95%", "bits per byte", "targets", "documents")
    lines += _table(head, rows)
    lines += [
        "",
        "A perplexity is comparable with another of the same protocol and the same targets digest only. The 95%",
        "interval is for this model on other texts.",
        "",
    ]
    return "\n".join(lines)


def _result_rows(item: EvalResult) -> list[tuple[Any, ...]]:
    protocol = item.protocol
    how = protocol.name + (f", {protocol.kind.parameter} {protocol.scored}" if protocol.scored else "")
    if item.window:
        how += f", window {item.window}"
    if item.baseline:
        how += f", {item.baseline} baseline"
    rows = []
    for row in item.rows:
        factor = "" if row.factor is None else f" {row.factor:g}"
        if row.ppl is None:
            numbers: tuple[Any, ...] = (row.status, "", "")
        else:
            interval = "" if row.ci95 is None or None in row.ci95 else "{:.4g} to {:.4g}".format(*row.ci95)
            bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
            numbers = (f"{row.ppl:.4f}", interval, bits)
        digest = f"`{row.targets_digest or ''}`"
        rows.append((how, item.data, item.scaling + factor, row.ctx, *numbers, digest, row.documents))
    return rows


def _method(tree: Mapping[str, Any]) -> str:
    return f"{tree['name']} {_parameters(Method(tree['name'], {k: v for k, v in tree.items() if k != 'name'}))}".strip()


def _parameters(method: Method) -> str:
    return ", ".join(f"{key}={value}" for key, value in method.parameters.items() if value is not None)


def _table(head: Sequence[str], rows: Any) -> list[str]:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return [line(head), line("---" for _ in head), *(line(row) for row in rows)]
