"""Groups of sequences by length, so that little is padded; without torch, for plans and checks."""

from collections.abc import Sequence, Sized


def by_length(sequences: Sequence[Sized], longest_first: bool = False) -> list[int]:
    """Places of sequences by length, so that little is padded; those of one length keep theirs.

    Longest first, running out of memory happens at once.
    """
    sign = -1 if longest_first else 1
    return sorted(range(len(sequences)), key=lambda place: sign * len(sequences[place]))


def by_tokens(sequences: Sequence[Sized], tokens: int, even: bool = False) -> list[list[int]]:
    """Groups of places of sequences, the longest first, of at most `tokens` padded tokens each.

    A sequence longer than that is alone in its group; with `even` a group is of one length.
    """
    groups: list[list[int]] = []
    for place in by_length(sequences, longest_first=True):
        longest = len(sequences[groups[-1][0]]) if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= tokens
        if fits and not (even and len(sequences[place]) < longest):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
