"""From a run or a model to `metrics.json`.

`subjects` opens weights and has them answer, `store` keeps the answers, `sets` names the prompts
that they are asked. `scoring` counts answers and ranks prompts by the refusal mass of the first
answer token, `metrics` does it all for one subject. `protocols` says what an extension can be:
another subject, a change of its answers, a task, judges.
"""
