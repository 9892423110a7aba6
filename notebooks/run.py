"""Runs the notebooks and stores what they show: `make notebooks`.

    python notebooks/run.py [--check]

Times, warnings, and what a kernel says of itself are left out, so that a run that shows the same changes
nothing and names no folder of the machine that it ran on. With `--check` nothing is stored; the exit status
says whether every cell ran and shows the kinds of things that are stored.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 300
KEPT_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> Any:
    """The notebook with the outputs of a run in its own folder. Raises nbclient's error of the first cell."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:
        # In the file system: no ports, and nobody else can talk to the kernel.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        resources = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, km=kernel, timeout=TIMEOUT_S, resources=resources).execute()
    notebook.metadata = nbformat.from_dict(KEPT_METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def kinds_of(notebook: Any) -> list[list[tuple[str, ...]]]:
    """For each cell the kinds of its outputs."""
    return [
        [(output.output_type, *sorted(output.get("data", ()))) for output in cell.get("outputs", ())]
        for cell in notebook.cells
    ]


def main(*, check: bool) -> int:
    """Run all notebooks of this folder."""
    wrong = 0
    for path in sorted(HERE.glob("*.ipynb")):
        stored, made = nbformat.read(path, as_version=4), executed(path)
        same = kinds_of(stored) == kinds_of(made)
        if not check:
            nbformat.write(made, path)
        print(f"{path.name}: {'as stored' if same else 'other outputs than are stored'}")
        wrong += check and not same
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
