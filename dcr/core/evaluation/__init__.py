"""From a run or a model to `metrics.json`.

`sets` names the prompts and keeps the answers, `subjects` opens weights and has them answer.
`scoring` counts answers and ranks prompts by the refusal mass of the first answer token.
`protocols` says what an extension can be: another subject, a change of its answers, a task, judges.
`dcr.eval` has the order of it all.
"""
