"""A table of texts as Markdown, LaTeX, HTML and CSV by pandas, and in the terminal by rich."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jinja2
import pandas as pd
from markupsafe import Markup
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from dcr import results
from dcr.ending import printable

ABSENT = "–"
DOCUMENT = r"""% LuaLaTeX or XeLaTeX know every letter; a tabular alone can be taken into a paper
\documentclass{article}
\usepackage[a4paper,landscape,margin=1cm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
\noindent\resizebox{\linewidth}{!}{%
"""


@dataclass(frozen=True)
class TextTable:
    """Texts by row and heading, with footnotes.

    If they are given, a CSV file holds `values` and the terminal shows `brief` instead.
    """

    macro: ClassVar[str] = "table"
    title: str
    frame: pd.DataFrame
    notes: Sequence[str] = ()
    values: pd.DataFrame | None = None
    brief: pd.DataFrame | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[object]], *heads: str, notes: Sequence[str] = ()
    ) -> "TextTable | None":
        """A table without a title of its own; None without rows."""
        frame = pd.DataFrame(rows, columns=list(heads), dtype=object)
        return cls("", frame, notes) if rows else None


def _mapped(frame: pd.DataFrame, text_of: Callable[[str], str] = str) -> pd.DataFrame:
    """The frame with every text on one line, as `text_of` writes it."""

    def text(value: object) -> str:
        return text_of(" ".join(printable(str(value)).split()))

    return frame.map(text).rename(columns=text)


def _in_markdown(text: str) -> str:
    plain = html.escape(text, quote=False)
    return "".join(f"\\{sign}" if sign in "\\`*_[]|~$" else sign for sign in plain)


def markdown(table: TextTable) -> str:
    """A heading, a pipe table, and the footnotes as a list."""
    pipes = _mapped(table.frame, _in_markdown).to_markdown(index=False, disable_numparse=True)
    notes = [f"- {_in_markdown(note)}" for note in table.notes]
    return "\n".join([f"## {_in_markdown(table.title)}\n", pipes, "", *notes, ""])


def latex(table: TextTable) -> str:
    """A document of two tabulars with booktabs: the table, and its title above its footnotes."""
    notes = _mapped(pd.DataFrame({table.title: table.notes}, dtype=object))
    wide = r"p{.95\linewidth}"
    return (
        DOCUMENT
        + _mapped(table.frame).to_latex(index=False, escape=True)
        + "}\n\n"
        + notes.to_latex(index=False, escape=True, column_format=wide)
        + "\\end{document}\n"
    )


WRITERS: dict[str, Callable[[TextTable], str]] = {
    "md": markdown,
    "csv": lambda table: results.csv_text(table.frame if table.values is None else table.values),
    "tex": latex,
    "html": lambda table: templates().get_template("table_page.html").render(table=table),
}


def templates(escaping: bool = True) -> jinja2.Environment:
    """The templates; those of HTML escape all text from files."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dcr"), autoescape=escaping, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["table"] = lambda table: Markup(  # everything in it is escaped
        _mapped(table.frame).to_html(index=False, border=0, justify="unset")
    )
    return environment


# --- the terminal -------------------------------------------------------------------------------


def bare() -> RichTable:
    """A table whose only line is below its heads."""
    return RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)


def in_terminal(table: TextTable) -> RichTable:
    """The texts with their headings, folded in a narrow terminal."""
    drawn, frame = bare(), table.frame if table.brief is None else table.brief
    for head in frame.columns:
        drawn.add_column(Text(str(head)), overflow="fold")
    for row in frame.itertuples(index=False):
        drawn.add_row(*(Text(printable(str(value))) for value in row))
    return drawn
