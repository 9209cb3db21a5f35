"""Judges: who says whether a response refuses, answers or does harm.

`judging` has the table of judges and asks them for what is missing; `served` and `guards` are the
judges themselves; `verdicts` is what they are asked, and how it is counted; `pairwise` says which
of two answers is better.
"""

from dcr.judges.judging import JUDGES, Ours, judge, node_of
from dcr.judges.verdicts import counts, usage
