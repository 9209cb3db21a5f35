"""From a run or a model to `metrics.json`.

`subjects` opens weights and has them answer, `store` keeps what they say, `sets` names the prompts
that they are asked. `scoring` counts answers and `verdicts`, `discernment` ranks prompts by the
refusal mass of the first answer token, `metrics` is all of it for one subject. `protocols` is what
an extension can be: another subject, a change of its answers, a task, judges.
"""
