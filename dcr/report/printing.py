"""Text from files as any page and terminal can hold it."""

import unicodedata


def printable(text: str) -> str:
    """Control characters as pictures, no lone surrogates; line ends and tabs stay."""
    return "".join(_shown(character) for character in text.replace("\r\n", "\n"))


def reason(error: Exception) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"
