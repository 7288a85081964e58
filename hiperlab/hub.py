"""Can the hub be asked? One short probe per process instead of its client's minute of retries and warnings."""

from __future__ import annotations

import functools
import threading

import huggingface_hub
from huggingface_hub import constants

PROBE_SECONDS = 10.0


@functools.cache
def hub_problem() -> str | None:
    """Why the hub cannot be asked, or None. Asked once per process, for at most about ten seconds."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS / 2)
            answer.append(None)
        except Exception as error:  # any failure at all means the same here, and its reason goes into the message
            answer.append(first_line(error))

    thread = threading.Thread(target=ask, daemon=True)  # a thread, as name resolution ignores timeouts
    thread.start()
    thread.join(PROBE_SECONDS)
    if not answer:
        return f"{constants.ENDPOINT} did not answer in {PROBE_SECONDS:.0f} s"
    return None if answer[0] is None else f"no connection to {constants.ENDPOINT}: {answer[0]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(". ")[:160] if lines else "") or type(error).__name__
