"""Text from files as any page and terminal can hold it."""

from dcr.text import printable

__all__ = ["printable", "reason"]


def reason(error: Exception) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
