"""A table of the paper as Markdown, CSV, LaTeX and HTML, everything from files escaped."""

import csv
import html
import io
import unicodedata
from collections.abc import Callable

from dcr.report.paper import PaperRow, PaperTable
from dcr.report.paper_columns import Cell

ABSENT = "–"
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},  # would be arguments of a line's end
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "−": r"\textminus{}",
    "±": r"\textpm{}",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "’": "'",
    "α": r"$\alpha$",
    "κ": r"$\kappa$",
}
MARKDOWN = {
    **{character: f"\\{character}" for character in "\\`*_[]|~$"},
    "<": "&lt;",
    ">": "&gt;",
    "&": "&amp;",
}
STYLE = """
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color-scheme: light dark;
  font: 15px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; font-size: .92em; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top; }
td { white-space: nowrap; } thead th { border-bottom: 2px solid; vertical-align: bottom; }
tbody tr > * { border-bottom: 1px solid #8886; }
th:first-child, .origin { text-align: left; } td.origin { min-width: 9rem; white-space: normal; }
tr.paper > td { opacity: .8; font-style: italic; }
.interval { display: block; font-size: .8em; }
tr.first > * { border-top: 1px solid; } .scroll { overflow-x: auto; }
ul.notes { padding-left: 1.1rem; font-size: .88rem; max-width: 60rem; }
"""


def markdown(table: PaperTable) -> str:
    """A pipe table with intervals, and the footnotes as a list."""
    heads = ["method", "numbers of", *(["judge"] if table.judged else []), *table.heads.values()]
    places = len(heads) - len(table.heads)
    lines = [
        f"## {_markdown(table.title)}\n",
        f"| {' | '.join(map(_markdown, heads))} |",
        f"|{' --- |' * places}{' ---: |' * len(table.heads)}",
    ]
    for row in table.rows:
        words = [row.method, row.origin, *([row.judge] if table.judged else [])]
        cells = [_markdown_cell(row.cells.get(key)) for key in table.heads]
        lines.append(f"| {' | '.join([*map(_markdown, words), *cells])} |")
    notes = [
        f"- {' '.join(filter(None, (_superscript(mark), _markdown(text))))}"
        for mark, text in table.notes
    ]
    return "\n".join([*lines, "", *notes, ""])


def _markdown(text: str) -> str:
    return "".join(MARKDOWN.get(character, character) for character in " ".join(text.split()))


def _markdown_cell(cell: Cell | None) -> str:
    return ABSENT if cell is None else cell.text() + _superscript(cell.marks)


def _superscript(marks: str) -> str:
    """Letters raised; the daggers stand as they are."""
    return "".join(f"<sup>{mark}</sup>" if mark.isalpha() else mark for mark in marks)


def csv_text(table: PaperTable) -> str:
    """One value a column, in full precision: estimate, interval, spread over seeds, prompts."""
    parts = ("low", "high", "spread", "n")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    values = [f"{key}{part}" for key in table.heads for part in ("", *(f"_{p}" for p in parts))]
    writer.writerow(["method", "source", "model", "run", "judge", *values, "marks"])
    for row in table.rows:
        cells = []
        for key in table.heads:
            cell = row.cells.get(key)
            found = (getattr(cell, part) for part in ("estimate", *parts)) if cell else [None] * 5
            cells += ["" if value is None else value for value in found]
        words = [row.method, row.source, row.model, row.run, row.judge]
        writer.writerow([*map(plain_cell, words), *cells, _marks(row)])
    return buffer.getvalue()


def plain_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def _marks(row: PaperRow) -> str:
    return "; ".join(f"{key}:{cell.marks}" for key, cell in row.cells.items() if cell.marks)


def latex(table: PaperTable) -> str:
    """A document of its own with booktabs; the tabular alone can be taken into a paper."""
    heads = ["method", "numbers of", *(["judge"] if table.judged else []), *table.heads.values()]
    places = len(heads) - len(table.heads)
    body, last = [], table.rows[0].method if table.rows else ""
    for row in table.rows:
        if row.method != last:
            body.append(r"\midrule")
        last = row.method
        words = [row.method, row.origin, *([row.judge] if table.judged else [])]
        cells = [_latex_cell(row.cells.get(key)) for key in table.heads]
        body.append(f"{' & '.join([*map(_latex, words), *cells])} \\\\")
    notes = [
        rf"\noindent{_latex_marks(mark) or '{}'} {_latex(text)}\par" for mark, text in table.notes
    ]
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage[T1]{fontenc}",
            r"\usepackage{textcomp}",
            r"\usepackage[a4paper,landscape,margin=1cm]{geometry}",
            r"\usepackage{booktabs}",
            r"\pagestyle{empty}",
            r"\begin{document}",
            rf"\noindent {_latex(table.title)}\par\medskip",
            r"\scriptsize\setlength{\tabcolsep}{3pt}",
            rf"\noindent\begin{{tabular}}{{{'l' * places}{'r' * len(table.heads)}}}",
            r"\toprule",
            f"{' & '.join(map(_latex_head, heads))} \\\\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\medskip",
            *notes,
            r"\end{document}",
            "",
        ]
    )


def _latex_head(text: str) -> str:
    """A heading of several words in as many short lines."""
    first, _, rest = text.partition(" ")
    if not rest:
        return _latex(text)
    return rf"\begin{{tabular}}[b]{{@{{}}c@{{}}}}{_latex(first)}\\{_latex(rest)}\end{{tabular}}"


def _latex(text: str) -> str:
    return "".join(_latex_character(character) for character in " ".join(text.split()))


def _latex_character(character: str) -> str:
    """What T1 fonts have; of other letters the plain form, or else the code point."""
    if character in LATEX:
        return LATEX[character]
    if character.isascii() or (character.isalpha() and "\u00c0" <= character <= "\u017e"):
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(LATEX.get(c, c) for c in plain) or f"{{[}}U+{ord(character):04X}{{]}}"


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return _latex(ABSENT)
    return _latex(cell.text(intervals=False)) + _latex_marks(cell.marks)


def _latex_marks(marks: str) -> str:
    return "".join(
        rf"\textsuperscript{{{mark}}}" if mark.isalpha() else _latex(mark) for mark in marks
    )


def html_table(table: PaperTable) -> str:
    """The table with its footnotes, to stand inside a page."""
    heads = ["method", "numbers of", *(["judge"] if table.judged else []), *table.heads.values()]
    left = len(heads) - len(table.heads)
    titles = "".join(
        f'<th scope="col"{" class=origin" if place < left else ""}>{html.escape(head)}</th>'
        for place, head in enumerate(heads)
    )
    rows, last = [], ""
    for row in table.rows:
        kind = " ".join(filter(None, (row.source, "first" if row.method != last else "")))
        last = row.method
        words = [row.origin, *([row.judge] if table.judged else [])]
        told = "".join(f'<td class="origin">{html.escape(word)}</td>' for word in words)
        cells = "".join(f"<td>{_html_cell(row.cells.get(key))}</td>" for key in table.heads)
        method = f'<th scope="row">{html.escape(row.method)}</th>'
        rows.append(f'<tr class="{kind}">{method}{told}{cells}</tr>')
    notes = "".join(
        f"<li>{_superscript(mark)} {html.escape(text)}</li>" for mark, text in table.notes
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="paper-table"><thead><tr>{titles}</tr>'
        f'</thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n<ul class="notes">'
        f"{notes}</ul>"
    )


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return ABSENT
    number, _, more = cell.text().partition(" ")
    below = f' <span class="interval">{more}</span>' if more else ""
    return f"{number}{_superscript(cell.marks)}{below}"


def html_page(table: PaperTable) -> str:
    """A page of its own."""
    title = html.escape(table.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{html_table(table)}\n</body>\n</html>\n"
    )


WRITERS: dict[str, Callable[[PaperTable], str]] = {
    "md": markdown,
    "csv": csv_text,
    "tex": latex,
    "html": html_page,
}
