"""The page's style: one column on a phone, two where there is room; light and dark."""

STYLESHEET = """
:root {
  --page: #ffffff; --card: #f5f6f9; --line: #d9dde5; --text: #1f2430; --quiet: #5a6272;
  --dit: #1d5fd1; --ridge: #c2570c; --mean: #6b7280; --good: #17753a; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #1a1e26; --card: #232833; --line: #39404d; --text: #dfe3ea; --quiet: #a2abba;
    --dit: #7db0ff; --ridge: #ff9f5a; --mean: #a2abba; --good: #6fd08c; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
p, dd { max-width: 44rem; }
.note, figcaption { color: var(--quiet); font-size: 0.875rem; }
.hint { display: none; }
.verdict {
  max-width: none; margin: 0 0 1rem; padding: 0.75rem 1rem; background: var(--card);
  border-left: 5px solid var(--mean); border-radius: 4px; font-weight: 600;
}
.verdict.wins { border-color: var(--good); }
.verdict.loses { border-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0.6rem; margin: 1.25rem 0; }
.tile { background: var(--card); border-radius: 6px; padding: 0.7rem 0.8rem; min-width: 0; }
.tile { border-top: 4px solid; }
.tile.dit { border-color: var(--dit); }
.tile.ridge { border-color: var(--ridge); }
.tile.mean { border-color: var(--mean); }
.tile .name { font-weight: 600; font-size: 0.9rem; }
.tile .value { font-size: clamp(1.4rem, 6vw, 2.2rem); line-height: 1.3; font-weight: 700; }
.tile .note { font-size: 0.8rem; line-height: 1.4; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.7rem; text-align: right; white-space: nowrap; font-size: 0.9rem; }
thead th { color: var(--quiet); font-weight: 600; border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th:first-child {
  text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--page);
}
tr.best > * { font-weight: 700; background: var(--card); }
td small { color: var(--quiet); font-weight: 400; }
figure { margin: 0; min-width: 0; }
.plots { display: grid; gap: 2rem; align-items: start; }
@media (min-width: 56rem) {
  .plots { grid-template-columns: 1fr 1fr; grid-template-rows: auto 1fr; }
  .plots figure:first-child { grid-row: span 2; }
}
.plots img { width: 100%; max-width: 34rem; height: auto; display: block; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.photos { gap: 1.25rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.pair img { width: 100%; aspect-ratio: var(--shape); display: block; border-radius: 3px; }
.pair img { object-fit: cover; }
.pair .map { image-rendering: pixelated; object-fit: fill; }
.pair div { padding: 0 0.6rem; color: var(--quiet); font-size: 0.875rem; align-self: center; }
.photos figcaption { margin-top: 0.35rem; }
.photos figcaption b { color: var(--text); }
.ramp { display: flex; gap: 0.6rem; align-items: center; font-size: 0.85rem; margin: 0 0 1rem; }
.ramp img { width: 12rem; height: 0.8rem; border-radius: 2px; }
dt { font-weight: 600; margin-top: 0.9rem; }
dd { margin: 0.15rem 0 0; }
.facts { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.3rem 1.2rem; }
.facts dt { margin: 0; color: var(--quiet); font-weight: 500; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
sub, sup { line-height: 0; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; font-weight: 600; padding: 0.35rem 0; }
details[open] summary { margin-bottom: 0.4rem; }
@media (max-width: 30rem) {
  main { padding: 0.75rem 0.8rem 3rem; }
  .tiles { gap: 0.4rem; }
  .tile { padding: 0.55rem; }
  th, td { padding: 0.4rem 0.5rem; font-size: 0.85rem; }
  th:first-child { white-space: normal; min-width: 6.6rem; max-width: 8rem; }
  td small { display: block; }
  .hint { display: block; }
}
"""
