"""The extensions that the entry points hand to the core, in one table."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcr.core.passes import Passes


def fast_passes() -> "Passes":
    """Those that take less time on a CPU, see `dcr.core.passes`."""
    from dcr.fast.passes import Fast  # with torch, which help and a user's error need not wait for

    return Fast()


def hand_in_passes() -> None:
    """From now on this process computes with them."""
    from dcr.core import passes

    passes.use(fast_passes())
