"""The style sheet of the page, and the script that draws its interactive curves."""

from __future__ import annotations

SCRIPT = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const boxes = [...document.querySelectorAll(".plot")];
  const specs = new Map(boxes.map(box => [box, JSON.parse(box.nextElementSibling.textContent)]));
  const off = new Map(boxes.map(box => [box, new Set()]));

  function draw(box, paper) {
    const { data, layout } = structuredClone(specs.get(box));
    const ink = paper ? "#1d2126" : css("--ink"), rule = paper ? "#d9dce1" : css("--rule");
    const back = paper ? "#ffffff" : css("--page"), soft = paper ? "#5c6470" : css("--soft");
    for (const trace of data) {
      const colour = dark.matches && !paper ? trace.meta.dark : trace.meta.light;
      for (const part of [trace.line, trace.marker, trace.marker && trace.marker.line, trace.error_y, trace.textfont])
        if (part && part.color) part.color = colour;
      trace.visible = !off.get(box).has(trace.meta.line);
    }
    const narrow = box.clientWidth < 560;
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      height: narrow ? 360 : 460, margin: { l: narrow ? 48 : 62, r: 14, t: 26, b: 52 },
      font: { family: css("--sans"), size: narrow ? 11 : 13, color: ink },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
      hoverlabel: { bgcolor: back, bordercolor: soft, align: "left", font: { color: ink, family: css("--sans") } },
    });
    for (const axis of [layout.xaxis, layout.yaxis])
      Object.assign(axis, { gridcolor: rule, linecolor: soft, tickcolor: soft, zeroline: false, ticks: "outside" });
    for (const axis of [layout.xaxis, layout.yaxis])
      axis.title.font = { size: narrow ? 11 : 13, color: soft };
    layout.xaxis.showgrid = false;
    layout.xaxis.showline = layout.yaxis.showline = true;
    for (const shape of layout.shapes) shape.line.color = ink;
    return Plotly.react(box, data, layout, {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  }

  const all = paper => Promise.all(boxes.map(box => draw(box, paper)));
  document.getElementById("interactive").hidden = false;
  all(false).then(() => { document.getElementById("still").hidden = true; })
    .catch(() => { document.getElementById("interactive").hidden = true; });
  dark.addEventListener("change", () => all(false));
  addEventListener("beforeprint", () => all(true));
  addEventListener("afterprint", () => all(false));

  for (const box of boxes)
    for (const button of box.parentElement.querySelectorAll("button"))
      button.addEventListener("click", () => {
        const line = Number(button.dataset.line), hidden = off.get(box);
        if (!hidden.delete(line)) hidden.add(line);
        button.setAttribute("aria-pressed", String(!hidden.has(line)));
        draw(box, false);
      });
})();
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfb; --ink: #1d2126; --soft: #5c6470; --rule: #d9dce1; --tint: #f3f3ee;
  --pass: #17703f; --fail: #b3261e; --open: #8a5a00; --side: #17703f1c;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "DejaVu Serif", serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --ink: #e7e8ea; --soft: #a3abb6; --rule: #363c45; --tint: #1d2127;
    --pass: #63c98f; --fail: #ff8a80; --open: #e5b75c; --side: #63c98f26;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1.0625rem/1.6 var(--serif); }
main, footer { max-width: 54rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding: 3.5rem 0 1rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.2; margin: 0 0 1rem; text-wrap: balance; }
h2 {
  font-size: 1.35rem; line-height: 1.3; margin: 3.25rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--rule);
}
h3 { font-size: 1.08rem; line-height: 1.4; margin: 0; font-weight: 600; text-wrap: pretty; }
p { margin: 0 0 .9rem; max-width: 42rem; text-wrap: pretty; overflow-wrap: anywhere; }
.found { font-size: 1.25rem; line-height: 1.5; max-width: 46rem; }
.notes, .why { color: var(--soft); font-size: .95rem; margin: .25rem 0 .75rem; padding-left: 1.2rem; max-width: 42rem; }
.notes li, .why li { overflow-wrap: anywhere; }
.caption, .facts, .source, .numbers, small, .mark, figcaption, table, .legend, dl, footer, pre, .badge, svg text {
  font-family: var(--sans);
}
.caption, figcaption { font-size: .875rem; line-height: 1.5; color: var(--soft); max-width: 46rem; }
figcaption strong { color: var(--ink); }
.facts { display: block; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }

.verdict { border-left: 3px solid var(--open); padding: .2rem 0 .2rem 1.1rem; margin: 1.9rem 0; break-inside: avoid; }
.verdict.pass { border-color: var(--pass); } .verdict.fail { border-color: var(--fail); }
.badge { font-size: .8rem; font-weight: 700; letter-spacing: .06em; margin: 0 0 .15rem; color: var(--open); }
.pass .badge { color: var(--pass); } .fail .badge { color: var(--fail); }
.reason { margin: .6rem 0 .2rem; }
.source { font-size: .84rem; color: var(--soft); margin: 0; max-width: none; }
.source code { font-size: .95em; color: var(--ink); }
.mark {
  display: inline-block; font-size: .76rem; line-height: 1.3; padding: 0 .4em; white-space: nowrap;
  border: 1px solid var(--rule); border-radius: 3px; color: var(--soft);
}
.check {
  display: grid; grid-template-columns: minmax(0, 1fr) 17rem; column-gap: 1.5rem; align-items: center;
  padding: .55rem 0; border-bottom: 1px solid var(--rule);
}
.check p { margin: 0; }
.what { font-size: .98rem; }
.numbers { font-size: .84rem; line-height: 1.45; color: var(--soft); font-variant-numeric: tabular-nums; }
.numbers { text-wrap: wrap; }
.check .numbers { grid-column: 1; }
.check svg { grid-column: 2; grid-row: 1 / span 3; width: 100%; height: auto; overflow: visible; }
.sign { font-weight: 700; color: var(--open); } .sign.pass { color: var(--pass); } .sign.fail { color: var(--fail); }
.check svg text { font-size: 10.5px; fill: var(--soft); }
.axis, .zero { stroke: var(--soft); stroke-width: .8; } .zero { stroke-dasharray: 2 2; }
.tau { stroke: var(--ink); stroke-width: 1.4; } .pass-side { fill: var(--side); }
.interval { stroke: var(--open); stroke-width: 2.6; } .theta { fill: var(--open); }
.interval.pass { stroke: var(--pass); } .theta.pass { fill: var(--pass); }
.interval.fail { stroke: var(--fail); } .theta.fail { fill: var(--fail); }

figure { margin: 1.25rem 0 1.75rem; break-inside: avoid; }
[hidden] { display: none !important; }
#still img { display: block; max-width: 100%; height: auto; background: #fff; }
.plot { width: 100%; min-height: 360px; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .15rem .35rem; margin: .25rem 0 0; padding: 0;
  font-size: .82rem;
}
.legend button {
  font: inherit; color: var(--ink); background: none; border: 1px solid transparent; border-radius: 4px;
  padding: .2rem .45rem; cursor: pointer; display: inline-flex; align-items: center; gap: .4rem; text-align: left;
}
.legend button:hover { border-color: var(--rule); }
.legend button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--soft); outline-offset: 1px; }
.legend button[aria-pressed="false"] { color: var(--soft); text-decoration: line-through; }
.legend button[aria-pressed="false"] svg { opacity: .25; }
.swatch { width: 26px; height: 10px; flex: none; --c: var(--light); }
.swatch line, .swatch path { stroke: var(--c); } .swatch circle { fill: var(--c); } .swatch path { fill: var(--page); }
@media (prefers-color-scheme: dark) { .swatch { --c: var(--dark); } }

.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .89rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.ppl { min-width: min(100%, 34rem); }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; white-space: nowrap; }
sup { font-size: .72em; line-height: 0; padding-left: .1em; }
header + section h2 { margin-top: 1.5rem; }
th, td { padding: .38rem .9rem .38rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--page); }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
td.text, th.text { text-align: left; white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
td small, th small { display: block; font-size: .76rem; font-weight: 400; color: var(--soft); }
.gap { color: var(--soft); font-style: italic; }
.protocol { background: var(--tint); padding: .9rem 1.1rem 1rem; margin: 1rem 0; break-inside: avoid; }
.protocol p { margin: .15rem 0 .6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .45rem 1.5rem; margin: 0; }
dl { font-size: .86rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.6; }
summary { cursor: pointer; font-family: var(--sans); font-size: .89rem; }
footer { color: var(--soft); font-size: .84rem; padding-top: 2rem; padding-bottom: 3rem; }

@media (max-width: 40rem) {
  header { padding-top: 2rem; }
  .check { grid-template-columns: minmax(0, 1fr); }
  .check svg { grid-column: 1; grid-row: auto; max-width: 22rem; }
  .verdict { padding-left: .85rem; }
}
@media print {
  :root {
    --page: #fff; --ink: #000; --soft: #444; --rule: #bbb; --tint: #f4f4f4;
    --pass: #17703f; --fail: #b3261e; --open: #8a5a00; --side: #17703f1c;
  }
  body { font-size: 10pt; } main, footer { max-width: none; padding: 0; }
  h2 { break-after: avoid; } .scroll { overflow: visible; } pre { white-space: pre-wrap; }
  .swatch { --c: var(--light); } .modebar { display: none !important; } tr { break-inside: avoid; }
}
"""
