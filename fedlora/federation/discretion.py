"""What a private client says, and what it keeps to itself; the list is `fedlora.privacy.disclosure`'s."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedlora.config import RunConfig
from fedlora.data.own import require_readable
from fedlora.errors import AssetError, ConfigError, FedloraError, ModelError, PrivacyError, ReplyError, RuleError
from fedlora.federation.client_pool import Failure
from fedlora.privacy.disclosure import WITHHELD
from fedlora.sanitize import clean_text
from fedlora.training.lent_base import FROZEN_CHANGED
from fedlora.training.out_of_memory import OUT_OF_MEMORY
from fedlora.training.own_loop import FROZEN_PART_CHANGED
from fedlora.training.workspace import close_workspace

logger = logging.getLogger(__name__)

TELLS_NOTHING = (AssetError, ConfigError, ModelError, PrivacyError, ReplyError, RuleError)
"""Errors of the config, the model and the messages: a private client sends their text, unless its data had been looked
at when they were raised (`looking_at_data`)."""


def withheld(error: Exception) -> PrivacyError:
    """What a private client says of an error instead of its text, which goes to its own log."""
    logger.warning("%s: %s", type(error).__name__, clean_text(error))
    logger.debug("a private client failed", exc_info=error)
    return PrivacyError(WITHHELD, code="withheld")


def failure_of(error: Exception, config: RunConfig | None) -> Failure | Exception:
    """What a client says of an error: its text, or in a private run no more than that it failed.

    Args:
        error: Any.
        config: As the client reads it; None where it cannot be read.

    Returns:
        The error itself if it ends a run that is not private: a fault of the program, memory that ran out, or a loop
        that changed what is frozen.
    """
    if config is not None and config.privacy is not None and not isinstance(error, TELLS_NOTHING):
        error = withheld(error)
    ends = not isinstance(error, FedloraError) or error.code in (OUT_OF_MEMORY, FROZEN_CHANGED, FROZEN_PART_CHANGED)
    if isinstance(error, FedloraError) and error.code == FROZEN_CHANGED:
        close_workspace()  # its base is not what it was
    return error if ends else Failure("refused", str(error))


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
