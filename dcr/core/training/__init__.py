"""Both stages, from the weights that each starts from to its result.

`stages` puts a stage together, `contrastive` and `sft` hold the training steps; `resuming` holds
what they share and makes training go on after a kill, `callbacks` leaves logs, snapshots and
costs, and `tracking` measures the paper's quantities on the way.
"""
