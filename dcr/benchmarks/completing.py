"""Answers to every prompt of every set: what is stored is kept, what is missing is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from dcr import generation
from dcr.benchmarks.sets import Benchmark
from dcr.generation import Completion
from dcr.sources import Example

# Rows in, batches of completions out, in any order; called only where something is missing.
Answerer = Callable[[list[Example]], Iterator[list[Completion]]]


def complete(
    benchmarks: Sequence[Benchmark], answer: Answerer, folder: Path, progress: bool = True
) -> dict[str, list[Completion]]:
    """Every completion that `folder` does not hold yet, stored as it comes; then all there are.

    The sets are answered together, so that batches stay full and of one length. A row that
    `answer` leaves out (a server that failed) is absent from the result, and asked next time.
    """
    homes: dict[str, list[tuple[str, str]]] = {}  # a prompt may stand in several sets
    rows: dict[str, Example] = {}
    for benchmark, row in _missing(benchmarks, folder):
        homes.setdefault(row.prompt, []).append((benchmark.name, row.id))
        rows.setdefault(row.prompt, row)
    hidden = not (progress and rows)
    with tqdm(total=len(rows), unit="prompt", desc="generating", disable=hidden) as bar:
        for batch in answer(list(rows.values())) if rows else ():
            by_set: dict[str, list[Completion]] = {}
            for completion in batch:
                for name, identity in homes[completion.prompt]:
                    by_set.setdefault(name, []).append(replace(completion, id=identity))
            for name, completions in by_set.items():
                generation.store(folder / f"{name}.jsonl", completions)
            bar.update(len(batch))
    return {b.name: _of_rows(folder / f"{b.name}.jsonl", b.rows) for b in benchmarks}


def _missing(benchmarks: Sequence[Benchmark], folder: Path) -> list[tuple[Benchmark, Example]]:
    found: list[tuple[Benchmark, Example]] = []
    for benchmark in benchmarks:
        done = generation.stored(folder / f"{benchmark.name}.jsonl")
        found += [
            (benchmark, row)
            for row in benchmark.rows
            if row.id not in done or done[row.id].prompt != row.prompt
        ]
    return found


def _of_rows(file: Path, rows: Sequence[Example]) -> list[Completion]:
    done = generation.stored(file)
    return [done[row.id] for row in rows if row.id in done and done[row.id].prompt == row.prompt]
