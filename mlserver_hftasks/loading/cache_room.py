"""How large the cache of a generating engine is, by default: from the memory that is free."""

from __future__ import annotations

from pathlib import Path

USUAL_SEQUENCES = 64
USUAL_TOKENS = 2048
"""Where memory allows, the cache has room for so many sequences of so many tokens, or as many as fit."""
SHARE_OF_MEMORY = 0.25
"""Of what is free, for the cache."""
SHARE_OF_DEVICE = 0.8
"""The same of an accelerator, whose memory nothing else needs."""
USUAL_MEMORY = 4 * 2**30
"""Where nobody says how much is free."""


def usual_tokens(memory: float, bytes_per_token: int, max_tokens: int) -> int:
    """Tokens of a cache that may take so many bytes, for a model that takes texts up to `max_tokens`."""
    affordable = int(memory / bytes_per_token)
    return max(min(affordable, USUAL_SEQUENCES * min(max_tokens, USUAL_TOKENS)), 1)


def free_ram() -> int:
    """Bytes that are free; of a container no more than its limit leaves."""
    found = [size for size in (_available(), _left_in_container()) if size is not None]
    return min(found, default=USUAL_MEMORY)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_in_container() -> int | None:
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroups, or no limit
        return None
    return max(limit - used, 0)
