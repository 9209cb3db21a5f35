"""From a run, a model or an endpoint to `metrics.json`.

`subjects` says whose weights answer, opens them and keeps what they say, `sets` which prompts they
are asked. `scoring` counts answers and verdicts, `discernment` ranks prompts by the refusal mass of
the first answer token, `calibration` moves its logits, `quality` compares answers with a
reference's (AlpacaEval), `ability` runs the lm-evaluation-harness on `questions` of a local folder
or the hub, `weights` measures what a model would say without letting it speak. `metrics` is all of
it for one subject.
"""
