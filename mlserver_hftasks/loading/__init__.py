"""From settings to something that serves.

`serve` puts it together, `source` reads the hub or a folder, `facts` says what the model says of itself,
`memory` sees to that of the process.
"""

from mlserver_hftasks.loading.serve import Served, load, probe_rows

__all__ = ["Served", "load", "probe_rows"]
