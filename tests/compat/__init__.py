"""`make compat`: the same requests to mlserver-huggingface and to this package, and what differs.

`peer` builds the incumbent's environment, `models` the models that both load, `servers` runs the two,
`replay` sends `requests.jsonl` to each, `compare` finds the differences, `known` reads those that
`docs/compatibility.md` explains, `report` shows the rest.
"""
