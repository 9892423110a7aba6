"""Models larger than one device: layers on several, or each layer's weights on several."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from mlserver_hftasks.errors import InvalidSettings
from mlserver_hftasks.settings import Settings

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What a process needs to know to be one of several."""


def placement_options(settings: Settings) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Raises `InvalidSettings` for what this process cannot do."""
    if settings.device_map is not None:
        return _device_map(settings)
    return {} if settings.tp_plan is None else _tensor_parallel(settings)


def is_placed(settings: Settings) -> bool:
    """Whether the weights are where they belong after loading, and must not be moved."""
    return settings.device_map is not None or settings.tp_plan is not None


def _device_map(settings: Settings) -> dict[str, Any]:
    if find_spec("accelerate") is None:
        raise InvalidSettings(
            "accelerate is not installed, expected it: pip install 'mlserver-hftasks[parallel]' "
            "@ parameters.extra.device_map"
        )
    if isinstance(settings.device_map, dict):
        for device in settings.device_map.values():
            _check_device(device, "device_map")
    options: dict[str, Any] = {"device_map": settings.device_map}
    if settings.max_memory is not None:
        options["max_memory"] = {_number(name): most for name, most in settings.max_memory.items()}
        for device in options["max_memory"]:
            _check_device(device, "max_memory")
    return options


def _number(name: int | str) -> int | str:
    """JSON has no numbers as keys."""
    return int(name) if isinstance(name, str) and name.isdecimal() else name


def _check_device(device: int | str, key: str) -> None:
    if device in ("cpu", "disk"):
        return
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator is not None else 0
    index = device if isinstance(device, int) else device.rpartition(":")[2]
    if not str(index).isdecimal() or int(index) >= count:
        raise InvalidSettings(
            f"got the device {device!r}, but torch sees {count} here, expected "
            f'{"" if not count else f"0..{count - 1}, "}"cpu" or "disk" @ parameters.extra.{key}'
        )


def _tensor_parallel(settings: Settings) -> dict[str, Any]:
    """MLServer starts one process that answers; the others of a torchrun would have nothing to do."""
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise InvalidSettings(
            f"got {settings.tp_plan!r}, but this process is not one of several ({', '.join(missing)} are not "
            'set), expected one that torchrun started, or "device_map": "auto" @ parameters.extra.tp_plan'
        )
    from transformers.distributed import DistributedConfig

    return {
        "distributed_config": DistributedConfig(
            tp_plan=settings.tp_plan, tp_size=int(os.environ["WORLD_SIZE"])
        )
    }
