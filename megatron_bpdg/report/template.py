"""Markup of the report page: a style sheet and small builders that escape what they are given."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { --ink: #1f2937; --faint: #6b7280; --line: #e5e7eb; --paper: #ffffff; --ground: #f8fafc; --accent: #2563eb;
  --good: #047857; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 15px; }
main { max-width: 1200px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -0.02em; }
h2 { font-size: 18px; margin: 0 0 2px; letter-spacing: -0.01em; }
p { margin: 0; }
.lead, .about, .absent, footer { color: var(--faint); }
.lead { margin-top: 4px; }
.about { font-size: 13.5px; max-width: 95ch; margin-bottom: 12px; }
.absent { font-style: italic; font-size: 13.5px; }
nav { margin: 18px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin-top: 20px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px 24px; margin: 0; }
.facts dt { color: var(--faint); font-size: 12px; text-transform: uppercase; letter-spacing: 0.05em; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 16px 28px; align-items: end; }
figure { margin: 0; }
.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--faint); font-size: 12px; font-weight: 600; text-transform: uppercase;
  letter-spacing: 0.05em; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
table + .figures, .figures + .figures, table + table { margin-top: 20px; }
.interval { color: var(--faint); font-size: 13px; }
.good { color: var(--good); font-weight: 650; }
.bad { color: var(--bad); font-weight: 650; }
.warning { border-color: #fca5a5; background: #fef2f2; color: #7f1d1d; padding: 12px 24px; }
.samples { display: grid; grid-template-columns: 1fr 1fr; gap: 16px 28px; align-items: start; }
.sample { border: 1px solid var(--line); border-left: 4px solid var(--bad); border-radius: 6px; padding: 10px 14px;
  min-width: 0; }
.sample.right { border-left-color: var(--good); }
.sample header { display: flex; justify-content: space-between; font-size: 13px; color: var(--faint); }
pre { margin: 6px 0 0; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 340px; overflow-y: auto; }
pre.prompt { color: var(--faint); max-height: 130px; padding-bottom: 6px; border-bottom: 1px dashed var(--line); }
details summary { cursor: pointer; font-weight: 600; }
details pre { max-height: none; }
footer { font-size: 13px; margin-top: 24px; }
@media screen and (max-width: 800px) { .figures, .samples { grid-template-columns: 1fr; } }
@media print {
  body { background: none; font-size: 12px; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  section { border: 0; padding: 0; margin-top: 24px; }
  figure, .sample, tr { break-inside: avoid; }
  h2, .about { break-after: avoid; }
  .about, .interval, th { font-size: 11px; }
  pre { max-height: none; overflow: visible; }
}
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def section(anchor: str, title: str, about: str, body: str) -> str:
    """A card of the page. `title` and `about` are plain text, `body` is markup."""
    explanation = f'<p class="about">{escape(about)}</p>' if about else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{explanation}{body}</section>'


def absent(what: str) -> str:
    """The line that stands in for a part without data."""
    return f'<p class="absent">{escape(what)}</p>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Labelled values in a grid; both plain text."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int) -> str:
    """Table of markup cells; columns from index `numeric_from` on are aligned right."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if index >= numeric_from else ''}>{value}</{tag}>"
            for index, value in enumerate(values)
        )

    head = cells("th", [escape(column) for column in columns])
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figures(markup: Iterable[str]) -> str:
    """Grid of two columns."""
    return f'<div class="figures">{"".join(markup)}</div>'


def figure(svg: str, wide: bool = False) -> str:
    return f"<figure{' class=wide' if wide else ''}>{svg}</figure>"


def page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
