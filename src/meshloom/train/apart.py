"""A function in a process of its own: what it starts (threads, pools) and holds ends with it."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from meshloom import errors
from meshloom.errors import RunFailed


def run_apart(function: Callable[[], None]) -> None:
    """Call `function` in a forked process and wait; raises what it raised if that was a MeshloomError.

    Ranks are forked from this process later, which must have no threads then. Elsewhere than on Linux ranks are
    spawned, so that the function may as well run here.
    """
    if sys.platform != "linux":
        function()
        return
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    sys.stdout.flush()
    child = context.Process(target=_run, args=(function, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        told = ours.recv_bytes()
    except EOFError:
        told = b""
    child.join()
    ended = json.loads(told) if told else None
    if ended is not None and ended["kind"] == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if ended is not None and ended["kind"]:
        raise getattr(errors, ended["kind"], RunFailed)(ended["message"])
    if ended is None:
        code = child.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise RunFailed(f"the process that prepared the data was ended ({how}); SIGKILL often means too little memory")


def _run(function: Callable[[], None], told: Connection) -> None:
    ended = {"kind": "", "message": ""}
    try:
        function()
    except KeyboardInterrupt:
        ended["kind"] = "KeyboardInterrupt"
    except Exception as error:
        ended = {"kind": type(error).__name__, "message": str(error)}
        if not isinstance(error, errors.MeshloomError):
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}:{last.lineno}"
            ended["message"] = f"preparing the data failed: {type(error).__name__}: {error} ({where})"
    told.send_bytes(json.dumps(ended).encode())
