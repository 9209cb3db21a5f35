"""Arms of an experiment compared on generated answers at equal achieved safety.

`answers` keeps both greedy answers of every prompt, `arms` compares models by them, and the command
prints the comparison that a plan names.
"""
