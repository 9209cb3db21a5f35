"""Folders of weights: written whole or not at all, and known by their fingerprint."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A staging folder beside `folder` that takes its place on success and vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        staging.chmod(0o755)
        _exchange(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, folder: Path) -> None:
    """Put `staging` where `folder` is; what was there is gone only once that has worked."""
    if not folder.exists():
        os.replace(staging, folder)
        return
    aside = staging.with_name(f"{staging.name}.old")
    os.replace(folder, aside)
    try:
        os.replace(staging, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside)


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder, in name order (16 hex digits)."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while piece := handle.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()[:16]
