"""Task files for the lm-evaluation-harness over local rows, and the reader that they name.

They give the prompts, choices, targets and metrics of the harness's own tasks of the same names,
and serve its command line as well:
`lm_eval --include_path dcr/benchmarks/tasks --metadata '{"root": "<data>"}' --tasks arc_easy …`
"""
