"""Whether the model hub can be reached, known within seconds: its own client tries for a minute, and loudly."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

from huggingface_hub import constants

_PATIENCE_S = 4.0


def hub_answers(patience_s: float = _PATIENCE_S) -> bool:
    """Whether the hub, or its stand-in (HF_ENDPOINT), answers within `patience_s`; False also if told to be offline.

    A gateway that says for it that it is not there (5xx) does not count: the hub's client would try again and again.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=patience_s).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
            error.close()
        except (OSError, ValueError, HTTPException):
            answers.append(False)

    # in a thread, for the time that a name server takes is bounded by no timeout
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience_s)
    return answers == [True]


@contextmanager
def only_local() -> Iterator[None]:
    """Within this, the hub's client looks into its cache and asks nobody; it would ask even for what it has."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
