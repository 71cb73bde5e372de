"""What every command does to its process: quiet libraries, signals, and errors as one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable

from rich import console

from clippo.errors import ClippoError

ENDING = (signal.SIGINT, signal.SIGTERM)


def guarded(run: Callable[[], int]) -> int:
    """Runs a command; an error that the user can mend becomes one line and status 2."""
    try:
        status = run()
        sys.stdout.flush()
    except ClippoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output (head, less) has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 128 + signal.SIGPIPE
    return status


class Console(console.Console):
    """A console whose reader may leave; rich would end the process with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def quiet(verbose: bool, *, one_thread: bool = True) -> None:
    """Without ``--verbose`` no logs of the libraries; one thread where many processes share the machine."""
    if one_thread:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not verbose:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # or Tune prints its own tables
        os.environ.setdefault("GLOG_minloglevel", "3")
    # Ray shows lines that differ in numbers alone once, but each of these is about another trial.
    os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", r"\] epoch \d+, step")
    # Tune would keep three more files of every trial, in a folder that goes with the sweep.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # What calls Ray after its end must not join whatever other Ray has been on this machine.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Tune would swallow the first Ctrl-C and end as if the sweep were done; ``ray job stop`` sends SIGTERM.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    for number in ENDING:
        signal.signal(number, _interrupted)
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_once, args=(reads,), daemon=True).start()


def _end_at_once(signals: int) -> None:
    """Ends the process at the second signal, even if the first thread waits for Ray and sees none.

    What is kept is safe by then, and so is what waits on disk.
    """
    for _ in range(2):
        while os.read(signals, 1)[0] not in ENDING:
            pass
    os._exit(130)


def _interrupted(number: int, frame: object) -> None:
    """Ends a command in good order."""
    raise KeyboardInterrupt
