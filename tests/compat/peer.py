"""The environment of the incumbent: the newest set of packages with which it still imports and serves."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

VENV = Path(__file__).parents[2] / ".venv-peer"
PINS = (
    "mlserver-huggingface==1.7.1",
    "mlserver==1.7.1",
    "transformers==4.41.2",  # 4.42 has no `Conversation`, which it imports
    "optimum[onnxruntime]==1.20.0",
    "numpy<2",  # transformers 4.41 is built on numpy 1
    "uvloop<0.22",  # 0.22 ends MLServer's parallel workers at their start
)


def python() -> Path:
    """The environment's Python; the environment is built, minutes long, where it is not there yet."""
    stamp = VENV / ".pins"
    wanted = "\n".join((sys.version, torch_pin(), *PINS))
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"building {VENV.name} (TensorFlow comes with it: about 2 GB)", flush=True)
        build()
        stamp.write_text(wanted)
    return VENV / "bin" / "python"


def build() -> None:
    """Make the environment anew. Raises `subprocess.CalledProcessError`."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    # torch first and by itself, as in the Makefile: else pip may choose gigabytes of CUDA
    for packages in ((torch_pin(),), (torch_pin(), *PINS)):
        # -I: or pip takes the package of the current folder for one that is installed
        subprocess.run(
            [VENV / "bin" / "python", "-I", "-m", "pip", "install", "--quiet", *packages], check=True
        )


def torch_pin() -> str:
    """The torch that this package runs on: the numbers shall differ by nothing but transformers."""
    return f"torch=={version('torch').partition('+')[0]}"
