"""The only door to MLServer: `model` answers requests, `server` mends the host, `metadata` describes."""

from mlserver_hftasks.runtime.model import HFTasksRuntime

__all__ = ["HFTasksRuntime"]
