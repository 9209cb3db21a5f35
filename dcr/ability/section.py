"""General ability on the page: accuracies by task of the harness."""

from dcr.report.grids import Block, Row, accuracy
from dcr.report.sections import Selection


def accuracies(chosen: Selection) -> list[Block]:
    """A block with a row for each task and metric, under its shots and questions; or none."""
    columns, rows = chosen.columns, []
    for task in dict.fromkeys(task for column in columns for task in column.evaluation.ability):
        scores = [a for column in columns if (a := column.evaluation.ability.get(task))]
        asked = dict.fromkeys(
            f"{a.shots}-shot, n = {a.n}{' (cut)' if a.limit is not None else ''}" for a in scores
        )
        for metric in ("acc", "acc_norm"):
            cells = tuple(accuracy(column.evaluation, task, metric) for column in columns)
            if any(cells):
                rows.append(Row(f"{task} {metric}", cells, aside=" or ".join(asked)))
    return [Block("General ability, accuracy, %", "ability, %", rows)] if rows else []
