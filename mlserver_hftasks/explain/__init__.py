"""Why a model answers as it does: how much each token of a text adds to a score.

`options` is what a client may ask, `result` what comes back, `explainer` the way between them.
"""
