"""The extensions that the entry points hand to the core, in one table."""


def hand_in_passes() -> None:
    """From now on this process computes with the passes that are fast on a CPU.

    Nothing is imported before: help and a user's error need no torch.
    """
    from dcr.core import passes
    from dcr.fast.passes import Fast

    passes.use(Fast())
