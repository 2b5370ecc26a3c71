"""Requests to the Hub: tried again where that may help, and told in one line where it does not.

Nothing of a request is ever shown: neither headers, which hold the token, nor addresses, which may be signed.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from retrofit.credentials import mask_tokens

Result = TypeVar("Result")

WAITS = (1.0, 4.0, 16.0, 60.0)
"""Seconds before each new try, where the Hub does not say how long to wait."""
_LONGEST_WAIT = 300.0

_TRANSIENT = {408, 429, 500, 502, 503, 504}
_MEANING = {
    401: "the Hub does not accept your login (401); run `hf auth login` (HF_TOKEN, where it is set, goes before it)",
    403: "the Hub forbids it to your login (403)",
    404: "the Hub finds nothing there (404)",
    409: "something else changed there meanwhile (409)",
    412: "something else changed there meanwhile (412)",
    429: "the Hub asks for a pause (429)",
}


class HubError(OSError):
    """A request that failed for good. The message is one line.

    Attributes:
        status: of HTTP; None where there was no answer.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


def patiently(request: Callable[[], Result], done: Callable[[], Result | None] | None = None) -> Result:
    """Calls `request`, and again after a pause while the Hub is busy (429), fails (5xx) or cuts the connection.

    Args:
        request: nothing but calls of the Hub's client, whose errors of any kind are told as errors of the Hub.
        done: asked after each failure of a request that must not be repeated: what came of one whose answer was lost,
            or None if nothing did.

    Raises:
        HubError: it failed for another reason, or every time.
    """
    for pause_after in (*WAITS, None):
        try:
            return request()
        except Exception as error:
            root, failure = _root(error), error
        wait = pause_after if _is_transient(root) else None
        if wait is not None:
            pause = min(_asked_pause(root) or wait, _LONGEST_WAIT)
            print(f"{reason(root)}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
        if done is not None and (result := patiently(done)) is not None:
            return result
        if wait is None:
            raise HubError(reason(root), _status(root)) from failure
    raise AssertionError("the last try returns or raises")


def reason(error: BaseException) -> str:
    """One line on what went wrong."""
    if isinstance(error, LocalTokenNotFoundError):
        return "you are not logged in to the Hub; run `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids asking the Hub; unset it"
    status = _status(error)
    if status is None and isinstance(error, HTTPError):
        return f"no connection to {constants.ENDPOINT} ({type(error).__name__})"
    said = getattr(error, "server_message", None) if status else str(error) or type(error).__name__
    said = "" if status in _TRANSIENT else one_line(said or "")
    meaning = _MEANING.get(status, f"the Hub answers {status}") if status else ""
    return ": ".join(filter(None, (meaning, said)))


def one_line(text: str) -> str:
    """A text from elsewhere, as it may be shown: short, without line breaks, tokens and signatures."""
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(text.split()))
    return mask_tokens(text[:300].rstrip(". "))


def _root(error: BaseException) -> BaseException:
    """The error of HTTP that the client wrapped, if any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HTTPError | OfflineModeIsEnabled):
            return cause
        cause = cause.__cause__
    return error


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return int(status) if status is not None else None


def _is_transient(error: BaseException) -> bool:
    """The third kind is what the Hub's uploader of chunks (Xet) raises, whatever happened to it."""
    status = _status(error)
    return status in _TRANSIENT if status is not None else type(error) is RuntimeError or isinstance(error, HTTPError)


def _asked_pause(error: BaseException) -> float | None:
    """Seconds of the header Retry-After."""
    value = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
    return float(value) if value.isdigit() else None
