"""The one exception whose text is meant for the person at the terminal."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: the text names the file or option, what was found, and the remedy.

    Command lines print it as one sentence without a traceback and exit with status 2 (see `run_command`).
    """


def one_line(error: object) -> str:
    """A library's complaint without its line breaks, to stand within a sentence."""
    return " ".join(str(error).split())


def named(error: OSError, path: object) -> OSError:
    """The error with the file it concerns: the operating system does not say which file a write or sync failed on."""
    if error.filename is not None:
        return error
    return OSError(error.errno or errno.EIO, error.strerror or one_line(error), str(path))


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command line's body; turn `UserError`, a full disk and Ctrl-C into one sentence and an exit status.

    Returns the body's status (0 for None), 2 after a `UserError` or an operating system error, 130 after Ctrl-C. A
    reader of its output that stops early (`| head`) is no error.
    """
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: everything committed so far is kept; run the same command to go on", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            return 0
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: {error.strerror or error}{where}: committed files are kept; mend the cause and run the same "
            "command again",
            file=sys.stderr,
        )
        return 2


def reader_left() -> bool:
    """Whether nobody reads standard output any more; what is left to write then goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # no file of the operating system's
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True
