"""The HTML shell of the report: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from bitfall.report_chart import escape

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1d2024; --soft: #636a73; --line: #e2e3e0;
  --grid: #ecedea; --full: #e9ebee; --accent: #1f6fb2; --second: #c8641c; --third: #2f8f63;
  --warn: #fff3d6; --warn-ink: #6b4a00; --heat: 32, 104, 162; }
@media (prefers-color-scheme: dark) { :root {
  --page: #121417; --card: #1a1d21; --ink: #e8eaed; --soft: #9aa2ac; --line: #2c3036;
  --grid: #262a30; --full: #30353c; --accent: #6fb3ec; --second: #f0a060; --third: #6fcf9f;
  --warn: #3a2f14; --warn-ink: #f3d692; --heat: 74, 156, 220; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.25; margin: 2px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 2px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 16px; }
section > p { margin: 0 0 12px; color: var(--soft); max-width: 75ch; }
.warning { background: var(--warn); color: var(--warn-ink); border-radius: 8px;
  padding: 8px 14px; margin: 14px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 12px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.tile span { display: block; color: var(--soft); font-size: 13px; }
.tile b { display: block; font-size: 23px; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 14px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 14px; margin-bottom: 6px; }
figcaption b { margin-right: 12px; font-weight: 600; }
.key { display: inline-flex; align-items: center; gap: 5px; margin-right: 10px;
  color: var(--soft); font-size: 13px; white-space: nowrap; }
.key i { width: 12px; height: 12px; border-radius: 3px; display: inline-block; }
.note { color: var(--soft); font-size: 13px; margin: 4px 0 0; }
.frame { display: grid; grid-template-columns: 52px minmax(0, 1fr); grid-template-rows: auto 22px; }
.plot { height: 200px; border-left: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.plot svg { width: 100%; height: 100%; display: block; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { stroke-width: 1.8; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .35; }
.dot { stroke-width: 6.5; stroke-linecap: round; }
.x, .y { position: relative; color: var(--soft); font-size: 12px;
  font-variant-numeric: tabular-nums; }
.x { grid-column: 2; }
.x span { position: absolute; top: 4px; transform: translateX(-50%); white-space: nowrap; }
.x span:first-child { transform: none; }
.y span { position: absolute; right: 8px; transform: translateY(50%); white-space: nowrap; }
.bits { display: grid; grid-template-columns: max-content minmax(0, 1fr); column-gap: 10px; }
.bits .name { font-size: 13px; line-height: 24px; text-align: right; color: var(--soft);
  max-width: 34vw; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bits .row { display: flex; height: 24px; padding: 1px 0; }
.bits .row i { display: block; overflow: hidden; text-align: center; font: 600 12px/22px inherit;
  font-style: normal; font-size: 12px; line-height: 22px; min-width: 0; }
.bits .row i:first-child { border-radius: 4px 0 0 4px; }
.bits .row i:last-child { border-radius: 0 4px 4px 0; }
.bits .x { height: 22px; }
.legend { margin: 10px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0;
  background: var(--card); }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8em; }
.matrix td { border: 2px solid var(--card); border-radius: 6px; text-align: center; }
.matrix th { text-align: center; border: 0; }
.size { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content;
  gap: 8px 10px; align-items: center; margin: 6px 0 12px; font-variant-numeric: tabular-nums; }
.size .bar { display: flex; height: 26px; }
.size .bar i { display: block; }
.size .bar i:first-child { border-radius: 4px 0 0 4px; }
.size .bar i:last-child { border-radius: 0 4px 4px 0; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 560px) { main { padding: 16px 10px 40px; } section { padding: 14px 12px; }
  h1 { font-size: 21px; } .tiles { grid-template-columns: 1fr 1fr; } .tile b { font-size: 19px; }
  .plot { height: 170px; } .frame { grid-template-columns: 46px minmax(0, 1fr); } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def page(title: str, subtitle: str, warnings: list[str], body: str) -> str:
    """The whole document; `body` is HTML, everything else is text."""
    notices = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><p>bitfall report</p><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
        f"{notices}{body}</main></body></html>\n"
    )


def section(title: str, explanation: str, body: str) -> str:
    """One card of the page; `body` is HTML. Empty when there is nothing to show."""
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2><p>{escape(explanation)}</p>{body}</section>"


def table(header: list[str], rows: list[list[str]], text_columns: tuple[int, ...] = ()) -> str:
    """A table of plain texts that scrolls sideways where it does not fit."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="text">{escape(cell)}</td>'
            if column in text_columns
            else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A part that opens on demand; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
