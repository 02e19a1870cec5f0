"""The HTML page of a report.

It opens without a network (a content security policy forbids it one) and reads without JavaScript: the interactive
curves stand in for a picture that is there anyway. Every string is escaped, as names come from data files and other
people's runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ropelab.config import about
from ropelab.evaluation import EvalResult
from ropelab.protocols import PROTOCOLS
from ropelab.report.assets import STYLE
from ropelab.report.breakdown import bend_section
from ropelab.report.figures import Line, Panel, Point, around, number, panels, protocol_words, styles
from ropelab.report.markup import esc, section
from ropelab.report.plot import curve_section, plot_scripts
from ropelab.report.results import finite
from ropelab.report.verdicts import nats, verdict_section

EQUAL = 0.03  # nats; point estimates closer than this are called equal in words (3% of a perplexity)
# a parameter of one protocol says nothing in another
OWNER = {kind.parameter: name for name, kind in PROTOCOLS.items() if kind.parameter is not None}
PROTOCOL_KEYS = {
    **{kind.parameter: kind.meaning for kind in PROTOCOLS.values() if kind.parameter is not None},
    "documents": "documents used",
    "left_out": "documents left out as too short",
    "span": "tokens of a block (span)",
    "max_ctx": "longest context the targets allow",
    "tokens": "budget of spanned targets",
    "unused": "documents beyond the budget",
    "tokenizer": "tokeniser",
    "bos": "begin-of-sequence token",
    "dtype": "precision",
    "data": "data",
    "data_digest": "data digest",
    "targets_digest": "targets digest",
    "document_digests": "document digests",
    "authors": "authors",
    "split": "split",
}


def html_page(
    evals: Sequence[EvalResult],
    verdicts: Sequence[Mapping[str, Any]],
    title: str,
    notes: Sequence[str],
    manifest: Mapping[str, Any],
    picture: bytes,
    diagnoses: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole page; `picture` is the PNG file of the curves, the rest as in `write_report`."""
    drawn = panels(evals)
    looks = styles(drawn)
    scripts = plot_scripts() if drawn else []
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    allowed = hashes or "'none'"
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [
        verdict_section(verdicts),
        curve_section(drawn, looks, picture),
        _number_section(drawn),
        _protocol_section(drawn),
        _context_section(drawn),
        bend_section(diagnoses, {line.name: look.colour for line, look in looks.items()}),
        _command_section(manifest.get("commands") or _commands(evals, verdicts)),
        _manifest_section(manifest),
    ]
    remarks = "".join(f"<li>{esc(note)}</li>" for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{esc(title)}</h1>
<p class="found">{esc(headline(evals, verdicts))}</p>
{f'<ul class="notes">{remarks}</ul>' if remarks else ""}
</header>
{"".join(sections)}
</main>
<footer><p>Made by ropelab, the referee of position encodings. The numbers of this page are in results.json and
results.csv beside it.</p></footer>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def headline(evals: Sequence[EvalResult], verdicts: Sequence[Mapping[str, Any]]) -> str:
    """What was found, in one or two sentences: how many statements hold, and the range of perplexities at the end."""
    sentences = []
    if verdicts:
        count = {word: sum(item["verdict"] == word for item in verdicts) for word in ("PASS", "FAIL", "INCONCLUSIVE")}
        noun, verb = "claim" if len(verdicts) == 1 else "claims", "holds" if count["PASS"] == 1 else "hold"
        parts = [f"{count['PASS']} of {len(verdicts)} {noun} {verb} here"]
        if count["FAIL"]:
            parts.append(f"{count['FAIL']} {'does' if count['FAIL'] == 1 else 'do'} not")
        if count["INCONCLUSIVE"]:
            parts.append(f"{count['INCONCLUSIVE']} {'stays' if count['INCONCLUSIVE'] == 1 else 'stay'} open")
        sentences.append(_listed(parts) + ".")
    drawn = panels(evals)
    panel = next((each for each in drawn if each.protocol.kind.only_context_grows), drawn[0] if drawn else None)
    if panel is not None:
        sentences.append(_range_sentence(panel))
    return " ".join(sentences) or "There is nothing to report yet."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _range_sentence(panel: Panel) -> str:
    """The lowest and highest perplexity at the longest ctx, and what has none there."""
    ctx = panel.ctxs[-1]
    plain = [line for line in panel.lines if line.window is None]
    ends = [(line, line.points[-1].ppl) for line in plain if line.points and line.points[-1].ctx == ctx]
    have = sorted(((ppl, line.name) for line, ppl in ends if ppl is not None), key=lambda pair: pair[0])
    times = ctx / panel.train_ctxs[0]
    where = f"At {ctx} tokens"
    if len(panel.train_ctxs) == 1 and times != 1:
        where += f", {times:g} times the training length,"
    gaps = [f"{line.name} is {line.gap[1]}" for line in plain if line.gap]
    if not have:
        return f"{where} no method has a perplexity: {_listed(gaps)}." if gaps else ""
    sentence = f"{where} the perplexity of {have[0][1]} is {number(have[0][0])}"
    if len(have) > 1:
        sentence = (
            f"{where} perplexity runs from {number(have[0][0])} ({have[0][1]}) to {number(have[-1][0])} ({have[-1][1]})"
        )
    sentence += f", by the protocol “{panel.protocol.name}”"
    return sentence + (f"; {_listed(gaps)}." if gaps else ".")


def _number_section(drawn: Sequence[Panel]) -> str:
    if not drawn:
        return ""
    body = "".join(_number_table(panel) for panel in drawn)
    body += (
        '<p class="caption">Small numbers are the 95% interval: of one run for this model on other texts, of three '
        "seeds or more over seeds (Student's t, on the logarithm); of two seeds they are the two.</p>"
    )
    return section("numbers", "Perplexities", body)


def _number_table(panel: Panel) -> str:
    ctxs = panel.ctxs
    heads = "".join(
        f'<th scope="col">{ctx}{"<small>trained</small>" if ctx in panel.train_ctxs else ""}</th>' for ctx in ctxs
    )
    reasons: list[str] = []
    rows = []
    for line in panel.lines:
        points = {point.ctx: point for point in line.points}
        reason = line.reason
        if reason and f"{line.name}: {reason}" not in reasons:
            reasons.append(f"{line.name}: {reason}")
        note = len(reasons) if reason else None
        cells = "".join(_number_cell(points.get(ctx), note) for ctx in ctxs)
        rows.append(f'<tr><th scope="row">{esc(line.name)}</th>{cells}</tr>')
    notes = "".join(f"<li>{esc(reason)}</li>" for reason in reasons)
    name = esc(panel.protocol.name)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="Perplexities by the protocol {name}">
<table class="ppl"><caption>Protocol “{name}”: perplexity by context length in tokens</caption>
<thead><tr><th scope="col">Method</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
{f'<ol class="why">{notes}</ol>' if notes else ""}
"""


def _number_cell(point: Point | None, note: int | None) -> str:
    if point is None:
        return '<td class="gap">not measured</td>'
    if point.ppl is None:
        return f'<td class="gap">{esc(point.status)}{f"<sup>{note}</sup>" if note else ""}</td>'
    ends = around(point)
    return f"<td>{number(point.ppl)}{f'<small>{esc(ends)}</small>' if ends else ''}</td>"


def _protocol_section(drawn: Sequence[Panel]) -> str:
    if not drawn:
        return ""
    boxes = []
    for panel in drawn:
        protocol: dict[str, Any] = {"data": panel.data, **panel.protocol.to_json()}
        keys = [key for key in (*PROTOCOL_KEYS, *sorted(protocol)) if key in protocol and key != "name"]
        keys = [key for key in dict.fromkeys(keys) if OWNER.get(key, protocol["name"]) == protocol["name"]]
        keys = [key for key in keys if _known(protocol[key])]
        words = protocol_words(panel.protocol)
        facts = "".join(
            f"<div><dt>{esc(PROTOCOL_KEYS.get(key, key))}</dt><dd>{esc(_said(protocol[key]))}</dd></div>"
            for key in keys
        )
        boxes.append(
            f'<div class="protocol"><h3>{esc(protocol["name"])}</h3><p>{esc(words[0].upper() + words[1:])}.</p>'
            f"<dl>{facts}</dl></div>"
        )
    intro = (
        "<p>Perplexity is the exponential of the mean loss over all targets. Documents are never joined, the first "
        "token of a document is never scored, and a document too short for the longest context is left out at every "
        "context. Numbers may be compared only where the targets digest is the same.</p>"
    )
    return section("protocol", "What was scored", intro + "".join(boxes))


def _known(value: object) -> bool:
    return any(each is not None for each in value) if isinstance(value, list) else value is not None


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and len(value) > 6:
        return f"{len(value)} entries, listed in results.json"
    return value if isinstance(value, str) else json.dumps(finite(value))


def _context_section(drawn: Sequence[Panel]) -> str:
    """Tables of context gain and window control, for the protocols that can tell."""
    tables = "".join(_context_table(panel) for panel in drawn)
    if not tables:
        return ""
    intro = (
        "<p>A flat curve can mean that a method uses the longer context, or only that it ignores what it cannot use. "
        "Two numbers tell them apart. The <em>context gain</em> is the loss at the training length minus the loss at "
        "the longest context, on the same targets: positive where more context helps. The <em>window control</em> runs "
        "the same weights but lets every layer see only the last W tokens: a method that does no better than its own "
        f"window shows no use of anything older. Differences up to {EQUAL} nats (3% of a perplexity) are called equal "
        "here; these are readings of single estimates, not tests.</p>"
    )
    return section("context", "Does it use the context, or only survive it?", intro + tables)


def _context_table(panel: Panel) -> str:
    ctx = panel.ctxs[-1]
    windows = {_family(line): line for line in panel.lines if line.window is not None}
    rows = []
    for line in panel.lines:
        if line.window is not None or line.train_ctx == ctx:
            continue
        end, start = _loss(line, ctx), _loss(line, line.train_ctx)
        control = windows.get(_family(line))
        walled = _loss(control, ctx) if control else None
        gain = None  # only `last` changes nothing but the context
        if panel.protocol.kind.only_context_grows and start is not None and end is not None:
            gain = start - end
        if end is None or (gain is None and walled is None):
            continue
        cells = (
            nats(gain) if gain is not None else "–",
            number(math.exp(end)),
            f"{number(math.exp(walled))}<small>W = {control.window}</small>" if control and walled is not None else "–",
        )
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        reading = f'<td class="text">{_reading(gain, end, walled)}</td>'
        rows.append(f'<tr><th scope="row">{esc(line.name)}</th>{numbers}{reading}</tr>')
    if not rows:
        return ""
    name = esc(panel.protocol.name)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="Use of context by the protocol {name}">
<table><caption>Protocol “{name}”, at {ctx} tokens</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Context gain<small>nats</small></th>
<th scope="col">Perplexity</th><th scope="col">Under its window</th>
<th scope="col" class="text">Reading</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
"""


def _family(line: Line) -> tuple[object, ...]:
    return line.pos, line.scaling, line.factor, line.changed, line.train_ctx, line.runs


def _loss(line: Line, ctx: int) -> float | None:
    point = next((point for point in line.points if point.ctx == ctx), None)
    return math.log(point.ppl) if point is not None and point.ppl is not None else None


def _reading(gain: float | None, end: float, walled: float | None) -> str:
    words = []
    if gain is not None:
        words.append("context helps" if gain > EQUAL else "context hurts" if gain < -EQUAL else "flat")
    if walled is not None:
        words.append(
            "worse than its own window"
            if end - walled > EQUAL
            else "better than its own window, so it uses older tokens"
            if end - walled < -EQUAL
            else "equal to its own window: no use of older tokens shows"
        )
    return "; ".join(words)


def _command_section(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = "\n".join(commands)
    return section("reproduce", "How to reproduce", f"<pre><code>{esc(lines)}</code></pre>")


def _commands(evals: Sequence[EvalResult], verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Commands that give these numbers again, from the runs they name."""
    commands = []
    if verdicts:
        commands.append(shlex.join(["ropelab", "reproduce", *dict.fromkeys(str(item["claim"]) for item in verdicts)]))
    for item in evals:
        protocol = item.protocol
        lengths = [str(row.ctx) for row in item.rows]
        words = ["ropelab", "eval", item.run, "--ctx", ",".join(lengths) + ("," if len(lengths) == 1 else "")]
        words += ["--protocol", protocol.name, "--scaling", item.scaling]
        words += [f"scaling.{key}={_setting(value)}" for key, value in item.changed["scaling_changed"].items()]
        if about("scaling", item.scaling).has_factor:
            words += ["--factor", "auto-row" if item.factor is None else f"{item.factor:g}"]
        asked = {protocol.kind.parameter: protocol.scored, "max_ctx": protocol.max_ctx, "tokens": protocol.tokens}
        words += [f"eval.{key}={value}" for key, value in asked.items() if value is not None]
        if item.window is not None:
            words.append(f"eval.window={item.window}")
        if item.baseline is not None:
            words.append(f"eval.baseline={item.baseline}")
        commands.append(shlex.join(map(str, words)))
    return list(dict.fromkeys(commands))


def _setting(value: object) -> str:
    """A parameter as it is typed."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _manifest_section(manifest: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in manifest.items() if key != "commands"}
    rows = "".join(
        f'<tr><th scope="row">{esc(key)}</th><td class="text">{esc(_said(value))}</td></tr>'
        for key, value in _flat(facts)
    )
    if not rows:
        return ""
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Versions and settings"><table>{rows}</table></div>'
    )
    if len(_flat(facts)) > 24:
        table = f"<details><summary>All {len(_flat(facts))} values</summary>{table}</details>"
    return section("versions", "Versions and settings", table)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted key, value)."""
    pairs: list[tuple[str, Any]] = []
    for key, each in value.items():
        pairs += _flat(each, f"{prefix}{key}.") if isinstance(each, Mapping) else [(f"{prefix}{key}", each)]
    return pairs
