"""From settings to something that serves.

`serve` chooses the way: `eager` has torch run a model of `source` (the hub or a folder), `programs` runs one
that was exported, ours (`manifest`) or another tool's, or exports it into `cache`. `facts` says what a model
says of itself, `served` is what comes of all of them, `memory` sees to that of the process.
"""

from mlserver_hftasks.loading.serve import load
from mlserver_hftasks.loading.served import Served, probe_rows

__all__ = ["Served", "load", "probe_rows"]
