"""The paper's claims on small steps and on states, measured on one model.

Eq. 2 and 3: what one SGD step on one (toxic prompt, refusal) pair does to every other prompt,
against the kernel; Proposition 1: the inner product of two prompts' states against the trunk's
kernel. `stepping` takes the steps, `measuring` does the rest.
Neither claim is taken as proven: the bound in A.7 does not follow from its steps, and of a kernel
only that over all parameters is the one of the step.
"""

from dcr.claims.measuring import Settings, alike, first_token, measure

__all__ = ["Settings", "alike", "first_token", "measure"]
