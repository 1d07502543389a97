"""HTML from tables, pictures and sentences: one file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { --ink: #1f2937; --faint: #6b7280; --line: #e5e7eb; --soft: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 52px 0 6px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 26px 0 4px; }
p { margin: 6px 0 12px; max-width: 92ch; }
.lead { color: var(--faint); margin-bottom: 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 22px 0 8px; }
.tile { background: var(--soft); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-variant-numeric: tabular-nums; font-weight: 650; }
.tile span { color: var(--faint); font-size: 13px; }
figure { margin: 14px 0 20px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: 14px; max-width: 84ch; margin-top: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14.5px; margin: 10px 0 16px; }
th, td { text-align: left; padding: 6px 22px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 550; }
table.numbers td + td, table.numbers th + th { text-align: right; font-variant-numeric: tabular-nums; }
table.numbers tr.first td { font-weight: 650; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
code { background: var(--soft); border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; }
pre { background: var(--soft); border-radius: 10px; padding: 14px 16px; overflow-x: auto; line-height: 1.45; }
.missing { background: #fff8e6; border-left: 3px solid #e69f00; padding: 10px 14px; border-radius: 4px;
  max-width: none; }
summary { cursor: pointer; color: var(--accent); margin: 8px 0; }
footer { color: var(--faint); font-size: 13px; margin-top: 56px; }
@media print { .tile, pre { border: 1px solid var(--line); } figure { break-inside: avoid; } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def image(picture: bytes, alt: str, caption: str = "") -> str:
    """A PNG inside the page. `alt` says what it shows to whom cannot see it."""
    data = base64.b64encode(picture).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{below}</figure>'


def facts_table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns: what, and its value."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table>{cells}</table></div>'


def number_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of figures; its first row stands out."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        f"<tr{' class=first' if number == 0 else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    ]
    return f'<div class="scroll"><table class="numbers"><tr>{top}</tr>{"".join(lines)}</table></div>'


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """The few figures one looks at first: (value, what it is)."""
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in items
    )
    return f'<div class="tiles">{cells}</div>'


def missing(sentence: str, command: str) -> str:
    """What is not there yet, and the command that makes it."""
    return f'<p class="missing">{escape(sentence)} <code>{escape(command)}</code></p>'


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def folded(title: str, text: str) -> str:
    """A long text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
