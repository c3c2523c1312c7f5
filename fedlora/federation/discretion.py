"""What a private client says, and what it keeps to itself; the list is `fedlora.privacy.disclosure`'s."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedlora.config import RunConfig
from fedlora.data.own import require_readable
from fedlora.errors import FedloraError, PrivacyError, ReplyError
from fedlora.privacy.disclosure import WITHHELD
from fedlora.sanitize import clean_text

logger = logging.getLogger(__name__)


def withheld(error: Exception) -> PrivacyError:
    """What a private client says of an error instead of its text, which goes to its own log."""
    logger.warning("%s: %s", type(error).__name__, clean_text(error))
    logger.debug("a private client failed", exc_info=error)
    return PrivacyError(WITHHELD, code="withheld")


@contextmanager
def looking_at_data(config: RunConfig, *, always: bool = False) -> Iterator[None]:
    """Inside, a client's data are read: of what is raised there, a private client says nothing.

    What does not depend on any example (a model that is not here, a column that a file's header lacks) is looked at
    once more, by itself, and told.

    Args:
        config: as the client reads it.
        always: whether clients that are not private say nothing either.
    """
    try:
        yield
    except Exception as error:
        if config.privacy is None and not always:
            raise
        try:
            require_readable(config)
        except FedloraError as told:
            raise ReplyError(str(told), code="own-data-unreadable") from error
        raise withheld(error) from error
