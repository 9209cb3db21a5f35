"""Thoughts on the page: how often they refuse, beside their answers, and who ended them."""

from collections.abc import Callable

from dcr.report.grids import WANTED, Block, Grid, Row, plain, set_names, share, together
from dcr.report.sections import Selection
from dcr.results.schema import Thoughts

COUNTED: dict[str, Callable[[Thoughts], int]] = {
    "refused in the thought and in the answer": lambda of: of.refused.both,
    "refused in the thought alone": lambda of: of.refused.thought_alone,
    "refused in the answer alone": lambda of: of.refused.answer_alone,
    "refused in neither": lambda of: of.refused.neither,
    "thought cut at the budget": lambda of: of.budget,
    "thought ended without an answer": lambda of: of.answerless,
}


def table(chosen: Selection) -> Grid:
    """Thoughts before answers.

    A thought refuses where it resolves to, by rules (`dcr.thinking`), an answer by XSTest's
    keywords. A thought that was cut, or that the model ended without an answer, was ended for it.
    """
    columns, blocks = chosen.columns, []
    for kind in WANTED:
        names = together(set_names(columns, kind))
        known = [column.evaluation.thinking for column in columns]
        found = [[of[name] for name in names if name in of] for of in known]
        rows = [
            Row(label, tuple(share(sum(map(count, of)), sum(s.n for s in of)) for of in found))
            for label, count in COUNTED.items()
        ]
        named = plain(kind.value)
        if any(found):
            title = f"Thoughts on {named} prompts, all sets, %"
            blocks.append(Block(title, f"thoughts, {named}, %", rows))
    return Grid(columns, blocks)
