"""What each task means: its signature, and the two ends of its pipeline. One file a task.

`base` holds the contract, `encoder` the tokenizer, `registry` finds a task by name.
"""
