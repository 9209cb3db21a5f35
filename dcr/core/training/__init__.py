"""All stages, from the weights that each starts from to its result.

`stages` puts a stage together, `contrastive`, `sft` and `readout` hold the training steps;
`resuming` holds what they share and makes training go on after a kill, and `callbacks` leaves logs,
snapshots and costs.
"""
