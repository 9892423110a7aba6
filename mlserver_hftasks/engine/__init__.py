"""Rows of many clients, batched and run on one device.

`rows` are the nouns, `cost` learns what a batch costs, `scheduler` decides which rows run next (pure
policy: no threads, no torch, no asyncio), `batcher` puts asyncio in front of it and the device thread
behind it.
"""
