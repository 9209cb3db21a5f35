"""Offline W&B runs read back from their files."""

import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(run: Path) -> list[Any]:
    """The records of a run's offline files, oldest first."""
    files = run.glob("wandb/offline-run-*/run-*.wandb")
    in_order = sorted(files, key=lambda file: file.stat().st_mtime_ns)
    return [record for file in in_order for record in records_of(file)]


def records_of(file: Path) -> list[Any]:
    """The records of one file: LevelDB's log format, each a protocol buffer."""
    content, block = file.read_bytes(), 2**15
    protocol: Any = wandb_internal_pb2
    found, parts, place = [], b"", 7  # behind the file's own header
    while place + 7 <= len(content):
        if block - place % block < 7:  # a header never spans two blocks
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(protocol.Record.FromString(parts))
            parts = b""
    return found
