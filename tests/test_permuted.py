"""Labels of pairs drawn at random: nothing is lost, and nothing but labels of pairs changes."""

import json
from pathlib import Path

import pytest

from benchmarks import permuted
from dcr.core import sources
from dcr.core.config import Kind
from dcr.core.config.training import ReadoutConfig


def test_half_of_the_pairs_change_sides_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["permuted.py", str(tmp_path), "--seed", "3"])
    permuted.main()
    named = ReadoutConfig()
    own = {
        kind: {row.id: row for name in getattr(named, kind.value) for row in sources.read(name)}
        for kind in permuted.KINDS
    }
    given = {
        kind: list(map(json.loads, (tmp_path / f"{kind.value}.jsonl").read_text().splitlines()))
        for kind in permuted.KINDS
    }
    for kind in permuted.KINDS:
        assert len(given[kind]) == len(own[kind])
    rows = {row["id"]: (row, kind) for kind in permuted.KINDS for row in given[kind]}
    everything = own[Kind.seemingly_toxic] | own[Kind.toxic]
    assert rows.keys() == everything.keys()
    changed = {i for i, (_, kind) in rows.items() if kind is not everything[i].kind}
    assert 0.4 < len(changed) / len(rows) < 0.6
    for identity, (row, _) in rows.items():
        assert row["prompt"] == everything[identity].prompt
    paired: dict[str, list[str]] = {}
    for identity, row in everything.items():
        paired.setdefault(row.group or identity, []).append(identity)
    for members in paired.values():
        if {everything[i].kind for i in members} == set(permuted.KINDS):
            assert len({i in changed for i in members}) == 1
        else:
            assert not changed & {*members}
