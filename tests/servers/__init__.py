"""OpenAI-compatible servers to test against, each on a free port of the loopback interface.

`scripted` answers as a Python function says, `faults` stands in front of another server and
misbehaves on purpose, and `served` runs `transformers serve`. All are context managers that yield
`http://127.0.0.1:PORT/v1`.
"""
