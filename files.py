"""Files that are whole or not there: writes that no crash tears, checksums, and a lock on a folder.
Nothing here knows of runs or tensors."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
import zlib

import numpy as np

UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(UMASK)


def lock(folder):
    """Locks a folder for this process, until the file that is returned is closed. Raises ValueError
    where another process has the lock for longer than a killed one takes to end."""
    file = open(folder / ".lock", "a")
    deadline = time.monotonic() + 10
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > deadline:
                raise ValueError("another run is writing to it") from None
            time.sleep(0.5)


@contextlib.contextmanager
def atomic_write(path, beside=None):
    """A path to write to, in the folder `beside` or in the file's own. The file there replaces
    `path` when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = (beside or path.parent) / f".{os.getpid()}.{path.name}"
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def delete_unfinished(folder):
    """Deletes what a killed run left unfinished in its folder; .tmp files are safetensors'."""
    for place in ("", "eval/", "checkpoints/", "models/*/"):
        for path in folder.glob(f"{place}.*"):
            if path.name in (".export", ".unfinished", ".old"):
                shutil.rmtree(path)
            elif re.fullmatch(r"\.\d+\..+|\.tmp\w+", path.name):
                path.unlink()


def sync(path):
    """Writes a file, or a folder's names, to the disk. A file gets the rights that others have:
    safetensors makes them for the owner alone."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    if path.is_file():
        path.chmod(0o666 & ~UMASK)


def checksum(path):
    """CRC-32 of a file, which is fast and finds what disks do; it is no protection from people."""
    return zlib.crc32(np.memmap(path, mode="r")) if path.stat().st_size else 0


def read_json_lines(path):
    """The lines of a log that a kill may have cut in its last one. Raises ValueError for others."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise ValueError(f"line {number} is damaged: delete it") from None
    return lines
