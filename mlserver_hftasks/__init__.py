"""Serve any Hugging Face model on MLServer.

MLServer reloads this module each time it loads a model from a folder, so it holds names only: a class
defined here would be a new class after every reload. The names are imported when they are asked for:
clients use `mlserver_hftasks.client` without torch and MLServer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlserver_hftasks.runtime import HFTasksRuntime
    from mlserver_hftasks.runtime import HFTasksRuntime as HuggingFaceRuntime

__all__ = ["HFTasksRuntime", "HuggingFaceRuntime"]
"""The second is the name that a `model-settings.json` of `mlserver_huggingface` ends with."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mlserver_hftasks.runtime import HFTasksRuntime

        return HFTasksRuntime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
