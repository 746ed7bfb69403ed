"""Print one line while the library huggingface_hub retries to reach the Hub, instead of two lines an attempt."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from moco.runtime.console import log

_LOGGER = "huggingface_hub.utils._http"
# Parts of the lines that the library prints for each failed attempt.
_ATTEMPTS = ("thrown while requesting", "Retrying in", "Rate limited")


@contextmanager
def quiet_retries() -> Iterator[None]:
    """Replace the library's lines, two for each failed attempt, by a single line; its other messages stay."""
    announced = False

    def is_other(record: logging.LogRecord) -> bool:
        nonlocal announced
        if not any(each in record.getMessage() for each in _ATTEMPTS):
            return True
        if not announced:
            announced = True
            log("the Hugging Face Hub does not answer: trying again, for up to a minute")
        return False

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
