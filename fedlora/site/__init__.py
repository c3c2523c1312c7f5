"""What a site decides about its own machine, whatever the coordinator asks.

A site's folder belongs to the user of its worker (`fedlora worker --site DIR`):

```
policy.toml        what runs may do here: `fedlora.site.policy`
node-config.toml   the node's own facts: its data file, number, device, rank, ledger
asked/HASH.toml    configs of runs that wait for an approval
audit.jsonl        what was asked and answered: `fedlora.site.audit_log`
approved/HASH.toml configs that may run: `fedlora node approve`
```
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError

NODE_CONFIG = "node-config.toml"
"""Name of the file with a node's own facts, in its site's folder."""


def node_facts(site: Path, *needed: str) -> dict[str, Any]:
    """The node's own facts.

    Args:
        site: The site's folder.
        needed: Keys that they must have.

    Raises:
        ConfigError: the file is missing or not usable, or lacks a key.
    """
    path = site / NODE_CONFIG
    try:
        facts = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}", code="file-not-readable") from None
    for key in needed:
        if key not in facts:
            raise ConfigError(f"{str(path)!r} lacks {key!r}, which the node needs here", code="missing-key")
    return facts
