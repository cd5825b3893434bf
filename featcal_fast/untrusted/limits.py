"""Strangers' programs (chat templates, regular expressions) in a process of their own, which may be ended."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NoReturn

from featcal_fast import files

PATIENCE = 10  # times as long it may take on a busy machine
BYTES = 3 * 2**27  # of memory, beyond what the process has
ANSWER = 2**28  # bytes of what it may give back


class LimitError(Exception):
    """A stranger's program takes too long, or too much memory, or ends its process."""


class ProgramError(Exception):
    """A stranger's program raised something: what kind of error, and what it says."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}" if text else kind)
        self.text = text


def limited(program: Callable[[], Any], seconds: int, nbytes: int = BYTES) -> Any:
    """What a program makes, in a copy of this process that is ended when it asks too much.

    Args:
        program: gives what JSON can hold. It must not use a GPU, nor threads that were started before.
        seconds: of a processor's time it may take.
        nbytes: of memory it may take, beyond what this process has.

    Raises:
        LimitError: it takes more.
        ProgramError: it raised something; says what.
    """
    receiving, sending = Pipe(duplex=False)
    with closing(receiving):
        with closing(sending), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are not there then: none is needed
            try:
                child = os.fork()
            except OSError as error:
                raise LimitError(f"no process can be had for it: {error.strerror}") from error
            if not child:
                receiving.close()  # else it would write to itself, were this process to end
                _answer(program, sending, nbytes, seconds)
        try:
            told = receiving.recv_bytes(ANSWER) if receiving.poll(seconds * PATIENCE) else b""
        except (EOFError, OSError):  # it is gone, or has too much to tell
            told = b""
        finally:
            code = _end(child)
    if not told and code in (-signal.SIGXCPU, -signal.SIGKILL):
        raise LimitError(f"it takes longer than {seconds} s")
    if not told:
        raise LimitError("it takes too much memory, or ends its process")
    answer = json.loads(told)
    if "limit" in answer:
        raise LimitError(answer["limit"])
    if "raised" in answer:
        raise ProgramError(*answer["raised"])
    return answer["made"]


def _end(child: int) -> int | None:
    """End a process that may have ended already, and leave nothing of it; its exit code, where it can be known."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with suppress(ChildProcessError):  # whoever embeds this one may wait for its children, or have them not waited for
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None


def _answer(program: Callable[[], Any], sending: Any, nbytes: int, seconds: int) -> NoReturn:
    """In the copy: nothing of it may get out but the answer."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        files.silence()
        faulthandler.disable()  # which has a standard error of its own
        gc.freeze()  # a search through all that this process has would take the program's time
        taken = int(files.read_text(Path("/proc/self/statm")).split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, taken + nbytes)
        _limit(resource.RLIMIT_CPU, seconds)
        _limit(resource.RLIMIT_CORE, 0)
        try:
            answer = {"made": program()}
        except MemoryError:
            answer = {"limit": f"it takes more than {nbytes / 2**30:g} GiB of memory"}
        except RecursionError:
            answer = {"limit": "it calls itself too often"}
        except Exception as error:
            answer = {"raised": [type(error).__name__, str(error)[:2000]]}
        sending.send_bytes(json.dumps(answer).encode())
    finally:
        os._exit(0)


def _limit(what: int, most: int) -> None:
    """Of this process; one that is lower already stays."""
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(what, (most, most))
