"""Which configs may run at a site, where its policy says `approval = true`: somebody of the site has read each.

A config that nobody has approved yet is written to the folder "asked", and its run is refused. `fedlora node approve`
moves it to "approved". A config is known by the SHA-256 of its text with every key written out, so that what runs is
what was read; files can be removed by hand.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, nearest
from fedlora.files import write_atomically

logger = logging.getLogger(__name__)

MOST_ASKED = 100
"""Configs that wait at once: a coordinator must not fill the disk."""


def config_hash(config: RunConfig) -> str:
    """By which a run's config is approved and written down (SHA-256, hexadecimal)."""
    return hashlib.sha256(config.to_toml().encode()).hexdigest()


@dataclass(frozen=True)
class Approvals:
    """The approvals of a site.

    Args:
        site: The site's folder.
    """

    site: Path

    def approved(self) -> list[str]:
        """Hashes of the configs that may run."""
        return _hashes(self.site / "approved")

    def waiting(self) -> list[str]:
        """Hashes of the configs that wait."""
        return _hashes(self.site / "asked")

    def text(self, digest: str) -> str:
        """A config that waits or was approved, as TOML.

        Args:
            digest: Its hash, or as much of its beginning as no other has.

        Raises:
            ConfigError: there is none, or more than one.
        """
        return self._path(digest, self.waiting() + self.approved()).read_text(encoding="utf-8")

    def allows(self, config: RunConfig) -> bool:
        """Whether a config was approved; one that was not waits from now on."""
        digest, text = config_hash(config), config.to_toml()
        if digest in self.approved():
            return True
        if len(self.waiting()) < MOST_ASKED:
            write_atomically(self.site / "asked" / f"{digest}.toml", text.encode())
        else:
            logger.warning(
                "%d configs wait already, and %s is not kept: remove some of %s", MOST_ASKED, digest, "asked"
            )
        return False

    def approve(self, digest: str) -> str:
        """Let a config that waits run; its whole hash.

        Args:
            digest: See `text`.

        Raises:
            ConfigError: no such config waits.
        """
        path = self._path(digest, self.waiting())
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise ConfigError(f"{str(path)!r} was changed since the run asked: remove it", code="config-changed")
        write_atomically(self.site / "approved" / path.name, data)
        path.unlink()
        return path.stem

    def _path(self, digest: str, among: list[str]) -> Path:
        found = {one for one in among if digest and one.startswith(digest)}
        if len(found) != 1:
            what = f"{len(found)} configs here begin" if found else "no config here begins"
            raise ConfigError(f"{what} with {digest!r}; {nearest(digest, among)}", code="no-such-config")
        (one,) = found
        path = self.site / "asked" / f"{one}.toml"
        return path if path.is_file() else self.site / "approved" / path.name


def _hashes(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.toml")) if folder.is_dir() else []
