"""What a user sees of a run in the terminal: errors of one line, messages, progress."""

import contextlib
import os
import shutil
import sys

import torch
import torch.distributed as dist
from tqdm.auto import tqdm


def fail(message, shared=False):
    """Ends the program over an error that its user can fix: one line on stderr, exit code 2. One
    that is `shared`, as all are before init_process_group, is found by all: rank 0 prints it."""
    if (dist.is_initialized() and not shared) or os.environ.get("RANK", "0") == "0":
        print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors(context, shared=False):
    """Turns any exception of the block into `fail`: for code that reads what the user has named. A
    block that all run alike is `shared`; yet a RuntimeError may be one's own: memory, network."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # report_crash says what to do
    except Exception as error:
        if os.environ.get("DEBUG"):  # for those who change the code: the traceback
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        first_line = str(error).strip().partition("\n")[0]
        fail(f"{context}: {kind}{first_line}", shared and not isinstance(error, RuntimeError))


def print0(message):
    """Prints on rank 0, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)


def progress(iterable, name, **options):
    """The iterable, under a bar; in a narrow terminal figures first, and the bar where there is
    room; in a file as a line every 10 seconds, or as often as tqdm's own TQDM_MININTERVAL says."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        seconds = float(os.environ.get("TQDM_MININTERVAL", 10))
        options |= dict(file=Lines(), mininterval=seconds, miniters=1, bar_format=line)
    elif (columns := shutil.get_terminal_size().columns) < 100:
        figures = "{desc} {n_fmt}/{total_fmt} <{remaining}{postfix} {bar}"
        options |= dict(bar_format=figures, ncols=columns - 1)
    return tqdm(iterable, name, **options)


class Lines:
    """Standard error, with a line for each new state of a bar, in place of overwriting one."""

    last = ""

    def write(self, text):
        line = text.replace("\x1b[A", "").strip()  # tqdm's way up from a bar below another
        if line and line != self.last:
            sys.stderr.write(line + "\n")
            self.last = line

    def flush(self):
        sys.stderr.flush()
