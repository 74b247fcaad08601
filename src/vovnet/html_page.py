"""The skeleton of an HTML page that needs nothing else: no scripts, no files, no network."""

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --faint: #555; --line: #ddd }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17181a; --faint: #a5a5a5; --line: #3a3c40 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } h3 { font-size: 1rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th { border-bottom: 1px solid var(--ink) } td:first-child, th:first-child { text-align: left }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
figcaption, .footing { color: var(--faint); font-size: 13px }
"""


def html_page(title: str, parts: Sequence[str], *, style: str = "") -> str:
    """A whole page with its parts, HTML each, in order; `style` is CSS beside the common one."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def html_paragraphs(lines: Sequence[str]) -> str:
    """Small print, a paragraph for each text, which is escaped."""
    return "\n".join(f'<p class="footing">{escape(line)}</p>' for line in lines)
