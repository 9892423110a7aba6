"""Programs that were exported once, by what they were made from."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlserver_hftasks.errors import InvalidSettings

logger = logging.getLogger("mlserver.hftasks")


SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".model", ".txt"})
MODULES = "[0-9]*_*/*"
"""Where sentence-transformers keeps what follows the transformer: `1_Pooling/config.json`."""


def place_of(key: str, setting: str | None) -> Path:
    """Where the program of that key is kept, or shall be: in the folder of the setting, else in the user's
    cache, else in a temporary folder.

    A program that is there is found where nothing can be written too. Raises `InvalidSettings` if the setting
    names a folder that cannot be.
    """
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlserver-hftasks" / "programs"
    folder = Path(setting) if setting else usual
    try:
        if not (folder / key).is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        return folder / key
    except OSError as error:
        if setting:
            raise InvalidSettings(
                f"'{setting}' cannot be written ({error.strerror}), expected a folder for programs "
                "@ parameters.extra.program_cache"
            ) from None
        temporary = Path(tempfile.mkdtemp(prefix="hftasks-programs-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        logger.warning(
            "%s cannot be written (%s): the program is exported at every start", usual, error.strerror
        )
        return temporary / key


def key_of(files: Path, *, code: bool = False, **made_from: object) -> str:
    """A name for what is made of a folder's config and weights, and of `made_from`, which JSON must hold.

    With `code` the folder's Python files take part in it.
    """
    suffixes = SUFFIXES | {".py"} if code else SUFFIXES
    digest = hashlib.blake2b(json.dumps(made_from, sort_keys=True, default=str).encode(), digest_size=16)
    for path in sorted((*files.iterdir(), *files.glob(MODULES))):
        if path.suffix in suffixes and path.is_file():
            digest.update(str(path.relative_to(files)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def kept(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made by `make` if it is not there: by one process, while others wait; whole or not at all."""
    if not folder.is_dir():
        with _locked(folder):
            if not folder.is_dir():  # another may have made it meanwhile
                with new_folder(folder) as unfinished:
                    make(unfinished)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place in the end, or is removed if the block fails.

    Raises `InvalidSettings` for what the disk refuses.
    """
    unfinished: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        unfinished.chmod(0o755)
        yield unfinished
        unfinished.rename(folder)
    except OSError as error:
        raise InvalidSettings(
            f"'{folder}' cannot be written: {error.strerror or error}, expected room for it"
        ) from None
    finally:
        if unfinished is not None and unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that makes %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
