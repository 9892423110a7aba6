"""Programs that AOTInductor compiled: machine code in a `.pt2` package, for the CPU it was made on."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mlserver_hftasks.backends.program import Feed
from mlserver_hftasks.engine.rows import FloatArray
from mlserver_hftasks.errors import InvalidSettings

WHERE = "@ parameters.extra.pretrained_model"


def cpu_features() -> list[str]:
    """The architecture, and what this CPU can beyond that: the compiler may use all of it."""
    known = torch.cpu.get_capabilities()
    return [platform.machine(), *sorted(name for name, has in known.items() if has is True)]


def check_made_for(features: Sequence[str], version: str) -> None:
    """Raises `InvalidSettings` for a package of another CPU or of another torch, which could crash.

    `features` are `cpu_features()` where it was made, `version` is torch's there.
    """
    if missing := sorted(set(features) - set(cpu_features())):
        raise InvalidSettings(
            f"the program was compiled for a CPU with {', '.join(missing)}, which this one lacks, expected "
            f"`hftasks prepare --compile` on a CPU like this {WHERE}"
        )
    made, here = (".".join(each.split(".")[:2]) for each in (version, torch.__version__))
    if made != here:
        raise InvalidSettings(
            f"the program was compiled with torch {version}, but this is torch {torch.__version__}, expected "
            f"`hftasks prepare --compile` with torch {here} {WHERE}"
        )


class CompiledRunner:
    """A compiled program; see `program.Runner`. Raises `InvalidSettings` for what cannot be read.

    It is unpacked into the temporary folder while it loads.
    """

    def __init__(self, path: Path) -> None:
        from torch._inductor import aoti_load_package
        from torch.utils._pytree import treespec_loads

        try:
            self._loader = aoti_load_package(str(path)).loader
            takes, gives = map(treespec_loads, self._loader.get_call_spec())
        except Exception as error:  # zip, the loader of libraries and torch each raise their own
            raise InvalidSettings(
                f"'{path.name}' cannot be loaded by torch: {' '.join(str(error).split()):.200}, expected a "
                f"package that `hftasks prepare --compile` made {WHERE}"
            ) from None
        self._takes: list[str] = takes.child(1).context
        self._gives: list[str] = gives.context
        self.inputs, self.outputs = frozenset(self._takes), frozenset(self._gives)

    def run(self, feed: Feed) -> Mapping[str, FloatArray]:
        """See `program.Runner`."""
        outputs = self._loader.boxed_run([torch.from_numpy(feed[name]) for name in self._takes])
        return {name: tensor.numpy() for name, tensor in zip(self._gives, outputs, strict=True)}

    def close(self) -> None:
        """See `program.Runner`."""
        del self._loader
