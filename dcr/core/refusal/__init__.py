"""Refusals: a completion's verdict by keywords, and the refusal mass of its first token.

`keywords` judges completions; `opening`, which needs torch, has the refusals' tokens and reads the
first one's logits.
"""
