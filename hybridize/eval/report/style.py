"""How a report looks: one style sheet, light and dark, from a phone's width up."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --raised: #f4f3ee; --ink: #1f2328; --quiet: #5a626b; --rule: #d9d7cf; --link: #0b57a0;
  --good: #18703f; --bad: #b3261e; --accent: 11, 98, 164;
  --c0: #6b7480; --c1: #0b62a4; --c2: #b45309; --c3: #0a7d5a; --c4: #a3427f; --c5: #5a4fcf; --c6: #7a6a00; --c7: #b3261e;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --raised: #1d2125; --ink: #e6e4df; --quiet: #a2a9b1; --rule: #3a4047; --link: #8ec5ff;
  --good: #6fd39a; --bad: #ff9a90; --accent: 92, 168, 232;
  --c0: #9aa4af; --c1: #6cb8f6; --c2: #f2a65a; --c3: #4fd1a5; --c4: #ee9bd0; --c5: #b0a8ff; --c6: #d9cb62; --c7: #ff9a90;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, "Source Serif 4", Georgia, serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 56px; } main { padding-bottom: 40px; } footer { padding-bottom: 56px; }
h1 { font-size: 34px; line-height: 1.2; font-weight: 600; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 22px; line-height: 1.3; font-weight: 600; margin: 0 0 16px; padding-top: 14px;
  border-top: 1px solid var(--rule); }
h3 { font: 600 13px/1.4 system-ui, sans-serif; margin: 24px 0 8px; color: var(--quiet); overflow-wrap: anywhere; }
section { margin-top: 52px; }
p { max-width: 68ch; margin: 10px 0; overflow-wrap: anywhere; }
.quiet, footer, figcaption { color: var(--quiet); }
a { color: var(--link); text-underline-offset: 3px; text-decoration-thickness: 1px; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px; }
.skip { position: absolute; left: -9999px; } .skip:focus { left: 16px; top: 12px; background: var(--paper); padding: 6px 10px; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 0; margin: 26px 0 0;
  font: 14px/1.9 system-ui, sans-serif; }
.verdict { margin-top: 30px; border-left: 5px solid var(--quiet); padding: 2px 0 2px 22px; }
.verdict h2, .verdict h3 { border: 0; padding: 0; margin: 0; } .verdict h3 { margin-top: 18px; }
.verdict .run { font: 600 13px/1.4 system-ui, sans-serif; color: var(--quiet); margin: 0 0 4px; }
.verdict .sentence { font-size: 19px; line-height: 1.55; margin: 8px 0 0; max-width: 64ch; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict.good h2, td.good, b.good { color: var(--good); } .verdict.bad h2, td.bad, b.bad { color: var(--bad); }
td.good, td.bad { font-weight: 600; }
.gates { list-style: none; padding: 0; margin: 18px 0 0; font: 14px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
.gates li { margin-top: 8px; } .gates p { margin: 0; max-width: 80ch; } .gates .gate { font-weight: 600; margin: 0 6px; }
.gates .numbers { white-space: nowrap; }
.box { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { text-align: left; padding: 5px 18px 5px 0; vertical-align: top; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--paper); z-index: 1; }
th.number, td.number { text-align: right; }
td.words { white-space: normal; min-width: 26ch; max-width: 62ch; }
td.shaded { padding: 5px 10px; background: rgba(var(--accent), calc(var(--v) * .42)); border-bottom-color: var(--paper); }
.layers { list-style: none; padding: 0; margin: 0; display: grid; gap: 6px;
  grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); font: 13px/1.35 system-ui, sans-serif; }
.layers li { background: var(--raised); border-left: 4px solid var(--k); padding: 6px 8px 8px; position: relative; min-width: 0; }
.layers .at { color: var(--quiet); float: right; } .layers b { display: block; font-weight: 600; overflow-wrap: anywhere; }
.layers i { display: block; height: 4px; margin-top: 5px; background: var(--rule); }
.layers i::before { content: ""; display: block; height: 100%; width: var(--w); background: var(--k); }
.charts { display: grid; gap: 26px 30px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
figure { margin: 0; max-width: 460px; }
figcaption { font: 600 13px/1.4 system-ui, sans-serif; margin-bottom: 4px; color: var(--ink);
  overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; fill: currentColor;
  stroke-linejoin: round; stroke-linecap: butt; overflow: visible; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 20px; padding: 0; margin: 0 0 14px;
  font: 13px/1.6 system-ui, sans-serif; }
.legend li, nav li { min-width: 0; overflow-wrap: anywhere; }
.legend span { color: var(--k); margin-right: 6px; }
details { margin: 12px 0; }
summary { cursor: pointer; font: 14px/1.6 system-ui, sans-serif; color: var(--link); overflow-wrap: anywhere; }
details > :not(summary) { margin-left: 18px; }
pre, dd { font: 13px/1.5 ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Consolas, monospace;
  background: var(--raised);
  padding: 10px 14px; margin: 4px 0 12px; }
pre { overflow-x: auto; } dd { white-space: pre-wrap; overflow-wrap: anywhere; }
dt { font: 600 13px/1.4 system-ui, sans-serif; color: var(--quiet); } dl { margin: 10px 0 22px; }
@media (max-width: 560px) {
  header, main, footer { padding-left: 16px; padding-right: 16px; } header { padding-top: 28px; }
  h1 { font-size: 27px; } .verdict { padding-left: 14px; } .verdict .sentence { font-size: 17px; } section { margin-top: 40px; }
  .layers { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
  tbody th { white-space: normal; min-width: 112px; } details > :not(summary) { margin-left: 0; }
}
@media print { nav, .skip { display: none; } section { break-inside: avoid; } }
"""
