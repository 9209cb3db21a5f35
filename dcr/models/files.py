"""Folders of weights, known by their fingerprint."""

import hashlib
from pathlib import Path

from dcr import storage


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder, in name order (16 hex digits)."""
    sums = storage.running_sha256(sorted(folder.glob("*.safetensors")), named=True)
    return (sums[-1] if sums else hashlib.sha256().hexdigest())[:16]
