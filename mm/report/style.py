"""The style sheet of the report: one column of text, light and dark, from 375 px on, and printed."""

import re

CSS = """
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --ink: #1c1e21; --faint: #6a6f76; --line: #e2e3e1; --panel: #f3f3f1;
  --c1: #2563b8; --c2: #b4530a; --c3: #17806d; --c4: #9c3587; --c5: #7d6a00; --c6: #c02b3c;
  --raw: #b9c4d6; --right: #1f8a4c; --wrong: #c9cbc8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181b; --ink: #e4e5e3; --faint: #979da5; --line: #303338; --panel: #1f2226;
    --c1: #74a9f7; --c2: #f0a35e; --c3: #4cc4a6; --c4: #e08fd0; --c5: #cdb840; --c6: #f2818d;
    --raw: #445269; --right: #46c07a; --wrong: #4a4e54;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 40px 24px 80px; max-width: 1080px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word; -webkit-text-size-adjust: 100%;
}
h1 { font-size: 28px; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 18px; font-weight: 650; letter-spacing: -.005em; margin: 52px 0 12px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
h3 .faint { font-weight: 400; margin-left: 6px; }
.about { margin-bottom: 20px; }
p { margin: 8px 0; max-width: 72ch; }
.faint, figcaption, .keys { color: var(--faint); font-size: 13.5px; }
.state { margin: 6px 0 0; color: var(--faint); }
.numbers { display: flex; flex-wrap: wrap; gap: 14px 44px; margin: 26px 0 0; padding: 0; }
.numbers div { min-width: 84px; }
.numbers dt { color: var(--faint); font-size: 13px; }
.numbers dd { margin: 0; font-size: 21px; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.sets, .plots { display: grid; gap: 30px 36px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.sets { grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 0 4px 14px; white-space: nowrap; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
th { font-weight: 400; color: var(--faint); font-size: 13px; }
thead th { border-bottom: 1px solid var(--line); }
tbody td { border-bottom: 1px solid var(--line); }
td.after { font-weight: 600; }
td.error { color: var(--faint); font-size: 13px; padding-left: 6px; width: 1%; }
td.before, td.chance { color: var(--faint); }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure text { font-family: inherit; font-variant-numeric: tabular-nums; }
.narrow { display: none; }
.keys { display: flex; flex-wrap: wrap; gap: 0 16px; margin: 0 0 4px; }
.keys i { display: inline-block; width: 14px; height: 0; margin: 0 6px 4px 0; border-top: 3px solid;
  border-radius: 2px; }
.keys i.dotted { border-top: 2px dotted; border-radius: 0; }
.query { padding: 14px 0; border-top: 1px solid var(--line); display: grid; gap: 10px 24px;
  grid-template-columns: minmax(0, 220px) minmax(0, 1fr); }
.query > p { margin: 0; font-weight: 500; }
.hits { display: flex; flex-wrap: wrap; gap: 12px; margin: 0; padding: 0; list-style: none; }
.hits li { width: 96px; font-size: 12.5px; color: var(--faint); font-variant-numeric: tabular-nums; }
.hits img { display: block; width: 96px; height: 96px; object-fit: contain; background: #fff;
  border-radius: 6px; border: 1px solid var(--wrong); margin-bottom: 3px; }
.hits .right img { border: 3px solid var(--right); }
.hits .right { color: var(--right); font-weight: 600; }
.scroll { overflow-x: auto; }
th.text, td.text { text-align: left; white-space: normal; }
.keys + .scroll { margin-top: 14px; }
td.interval { color: var(--faint); font-size: 13px; }
.halves { display: grid; gap: 26px 36px; margin: 22px 0; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.halves > div { min-width: 0; }
.bar { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr) 104px; gap: 0 10px; align-items: center;
  padding: 2px 0; font-size: 13.5px; break-inside: avoid; }
.bar .track { height: 12px; background: var(--panel); border-radius: 3px; }
.bar i { display: block; height: 100%; background: var(--c1); border-radius: 3px; }
.bar .value { color: var(--faint); font-size: 13px; text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; gap: 18px 20px; margin: 12px 0 4px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.card { display: grid; grid-template-columns: 96px minmax(0, 1fr); gap: 12px; align-items: start; min-width: 0;
  break-inside: avoid; }
.card img { width: 96px; height: 96px; object-fit: contain; background: #fff; border-radius: 6px;
  border: 1px solid var(--wrong); }
.said { margin: 0; padding: 0; list-style: none; font-size: 13.5px; line-height: 1.45; }
.said b { font-weight: 500; }
.said .right { color: var(--right); font-weight: 600; }
.said .score { color: var(--faint); font-weight: 400; font-size: 12.5px; font-variant-numeric: tabular-nums; }
.halves svg { max-width: 340px; }
.plain { font-size: 13.5px; }
.plain br { display: none; }
.plain li > * { margin-right: 8px; }
.up { color: var(--right); } .down { color: var(--c6); }
.differences td { white-space: normal; vertical-align: top; }
pre { background: var(--panel); border-radius: 6px; padding: 12px 14px; margin: 8px 0 18px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 2; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; }
details > :nth-child(2) { margin-top: 16px; }
details > h3 { margin-top: 22px; }
@media (max-width: 640px) {
  body { padding: 24px 16px 56px; font-size: 14.5px; }
  h1 { font-size: 24px; }
  h2 { margin-top: 40px; }
  .wide { display: none; }
  .narrow { display: block; }
  .query { grid-template-columns: minmax(0, 1fr); }
  .hits { gap: 8px; }
  .hits li, .hits img { width: 84px; }
  .hits img { height: 84px; }
  th, td { padding-left: 9px; }
  th.text, td.text { overflow-wrap: anywhere; min-width: 84px; }
  .brief th:last-child, .brief td:last-child { display: none; }
  td br + span small { display: block; }
  .bar { grid-template-columns: minmax(0, 5fr) minmax(0, 4fr) 88px; gap: 0 8px; }
}
@media print {
  :root {
    color-scheme: light;
    --page: #fff; --ink: #1c1e21; --faint: #5c6167; --line: #d5d6d4; --panel: #f1f1ef; --c1: #2563b8; --c2: #b4530a;
    --c3: #17806d; --c4: #9c3587; --c5: #7d6a00; --c6: #c02b3c; --raw: #b9c4d6; --right: #1f8a4c; --wrong: #c9cbc8;
  }
  body { max-width: none; padding: 0; font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3 { break-after: avoid; }
  h2 { margin-top: 28px; }
  figure, .query, tr, .sets > div { break-inside: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

LIGHT = dict(re.findall(r"--(\w+): (#[0-9a-f]+)", CSS.partition("@media")[0]))
"""The colours of the page in the light, by name."""
