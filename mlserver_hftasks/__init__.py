"""Serve any Hugging Face model on MLServer.

MLServer reloads this module each time it loads a model from a folder, so it holds names only: a class
defined here would be a new class after every reload.
"""

from mlserver_hftasks.runtime import HFTasksRuntime

HuggingFaceRuntime = HFTasksRuntime
"""The name that a `model-settings.json` of `mlserver_huggingface` ends with."""

__all__ = ["HFTasksRuntime", "HuggingFaceRuntime"]
