"""Everything that a run writes, in one folder.

```
runs/<name>/
  config.toml           the resolved config, every key
  environment.json      versions, processor, threads, processes, backend, kernels, attention, cohort, seed, commit
  config_changes.json   which keys a resume changed, and from which round on; of a run that was resumed so
  provenance.json       hashes of the base, tokenizer, class names and data (`fedlora.provenance`)
  run-id                the name by which clients know the run: their privacy ledgers, and what they keep
  privacy/              of a private run: what was asked of whom; a simulation's clients' ledgers, or the server's own
  partition.json        sizes and label counts of the clients (not of a private run, where they are secret)
  metrics.jsonl         one line a round; round 0 is the evaluation before training
  checkpoints/          the last two states, <round>.safetensors
  clients/              what a simulation's clients keep, where the rule lets them: what would be on their own machines
  merges/               base updates, <since>-<version>.safetensors, each written once
  adapter/              the final adapter, in PEFT's format; or adapter.unverified/, if it is not what was trained
  outcomes.safetensors  what was measured of each test example after the round whose model is kept; while a run keeps
                        its best round, those of the last evaluated round wait in outcomes-waiting.safetensors
  result.json           written last: a run that has it is finished, until a resume asks for more rounds
  tracking.json         under which id a tracker knows the run
  report.html           all of it to read, made from the other files by `fedlora report`
  baselines.json, samples.json, *.png
  .lock                 held by the process that writes the run
```

A file appears whole or not at all. In a round the line of metrics is written first and the checkpoint after it, so
that a checkpoint is never ahead of the metrics; a resume cuts the metrics back to its checkpoint.
"""

from __future__ import annotations

import errno
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from fedlora.aggregators import GlobalState
from fedlora.config import RunConfig, flat_keys, load_config
from fedlora.errors import FedloraError, RunDirError, nearest_file
from fedlora.files import locked, remove_unfinished, write_atomically
from fedlora.privacy.disclosure import Disclosure
from fedlora.provenance import Provenance, in_words
from fedlora.runs.checkpoints import Checkpoints
from fedlora.runs.config_changes import Change, changes_of, differs_in_more_than_machine, record, refused
from fedlora.runs.environment import describe_environment
from fedlora.runs.metrics_log import MetricsLog, plain
from fedlora.runs.place import (
    path_of,
    refuse_foreign,
    refuse_taken,
    remove_leftovers,
    remove_run,
    unwritable,
    whole,
)

Keep = Literal["all", "adapter", "metrics"]
"""How much of a finished run stays on disk."""

CHANGES = "config_changes.json"
PROVENANCE = "provenance.json"
PUT_BACK = "put back what it was made with, or name where that is now (--set model.name=... or data.source=...)"
RESUME_CURE = f"{PUT_BACK}, or start a new run with --set name=..."


def require_provenance(made: Provenance, found: Provenance, what: str, cure: str = RESUME_CURE) -> None:
    """Raise `RunDirError` unless what a run was made with is what is found now.

    Args:
        made: as the run says.
        found: now.
        what: the run, for the message.
        cure: what to do about it.
    """
    if changed := made.changed(found):
        verb = "is" if len(changed) == 1 and changed[0] != "class_names" else "are"
        raise RunDirError(
            f"{in_words(changed)} {verb} not what {what} was made with: {cure}", code="provenance-mismatch"
        )


def unverified(folder: Path) -> Path:
    """Where an export stays until it was loaded without us and compared, and where it is kept if it differs."""
    return folder.with_name(f"{folder.name}.unverified")


class RunDir:
    """One run's folder. Make one with `create` or `open`.

    Attributes:
        measured: names of the figures over the test examples in a line of metrics.
        checkpoints: the states that a resume goes on from.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self.measured: frozenset[str] = frozenset()
        self._may = None if config.privacy is None else Disclosure(config.privacy.unit)
        self.checkpoints = Checkpoints(path)
        self._log = MetricsLog(path / "metrics.jsonl")

    @classmethod
    def create(cls, config: RunConfig, root: str | Path | None = None, *, overwrite: bool = False) -> RunDir:
        """Make the folder of a new run and write its config and environment.

        Args:
            config: resolved; its `name` is the folder's name.
            root: the folder to make it in; None: `config.output`.
            overwrite: remove an earlier run of that name first.

        Raises:
            RunDirError: the folder is there, with an earlier run or with something else.
            ConfigError: the run's name cannot be a folder's name.
        """
        path = path_of(config, root)
        run = cls(path, config)
        try:
            refuse_foreign(path) if overwrite else refuse_taken(path)
            remove_leftovers(path)
            with whole(path) as made:
                cls(made, config).write_json("environment.json", describe_environment(config))
                write_atomically(made / "run-id", uuid.uuid4().hex.encode())
                write_atomically(made / "config.toml", config.with_absolute_paths().to_toml().encode())
                if overwrite and path.exists():
                    with run.writing():
                        remove_run(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another start was faster
                refuse_taken(path)
            raise unwritable(path, error) from None
        return run

    @classmethod
    def open(cls, path: str | Path, config: RunConfig | None = None, *, same: bool = False) -> RunDir:
        """A run that is there. Changes nothing in it.

        Args:
            path: of its folder.
            config: what the caller means to go on with; must be the run's own, but for what a resume may change
                (`fedlora.runs.config_changes`).
            same: whether it may change nothing but where and how far the run goes, as for the runs of a sweep.

        Raises:
            RunDirError: there is no run, its config is another (the message says which keys differ), or it has done
                more rounds than `config` asks for.
        """
        path = Path(path)
        if not (path / "config.toml").is_file():
            others = [str(found.parent) for found in path.parent.glob("[!.]*/config.toml")]
            raise RunDirError(f"there is no run in {str(path)!r}; {nearest_file(path, others)}", code="no-such-run")
        written = load_config(path / "config.toml")
        if config is not None:
            config = config.with_absolute_paths()
            changed = (differs_in_more_than_machine if same else refused)(written, config)
            if changed:
                raise RunDirError(
                    f"{str(path)!r} was started with another config: {_both(written, config, changed)}; "
                    f"{_why_not(changed)}start a new run with --set name=...",
                    code="config-differs",
                )
        if config is not None and config.rounds != written.rounds and written.privacy and written.privacy.epsilon:
            raise RunDirError(
                f"the noise of {str(path)!r} was calibrated for {written.rounds} rounds: resume with rounds = "
                f"{written.rounds}, or start a new run with --set name=...",
                code="noise-fixes-rounds",
            )
        run = cls(path, config or written)
        if config is not None and (done := run.rounds_done) > config.rounds:
            raise RunDirError(
                f"{str(path)!r} has {done} completed rounds, more than rounds = {config.rounds}: set rounds to "
                f"{done} or more, or start a new run with --set name=...",
                code="rounds-already-done",
            )
        return run

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, this process alone writes the run.

        Raises:
            RunDirError: another one is at it.
        """
        try:
            with locked(self.path / ".lock"):
                yield
        except BlockingIOError:
            raise RunDirError(
                f"another process is writing to {str(self.path)!r}: wait for it, stop it, or choose another name "
                "with --set name=...",
                code="run-in-use",
            ) from None

    @property
    def rounds_done(self) -> int:
        """How many rounds were completed."""
        result = self.read_json("result.json") or {"rounds": 0}
        return max(int(result["rounds"]), self.checkpoints.last_round)

    @property
    def begun(self) -> bool:
        """Whether a state was saved, so that a resume goes on from it and needs nothing of what the run began with."""
        return self.checkpoints.there

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, that of the config it was opened with."""
        result = self.read_json("result.json")
        return result is not None and (bool(result.get("stopped")) or self.rounds_done >= self.config.rounds)

    @property
    def run_id(self) -> str:
        """Under what name clients know the run, made with its folder.

        Raises:
            RunDirError: it is lost.
        """
        try:
            return (self.path / "run-id").read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RunDirError(
                f"{str(self.path / 'run-id')!r} is missing, and without it no client knows the run, nor how much "
                "privacy it has spent: restore it, or start a new run with --set name=...",
                code="run-id-missing",
            ) from None

    @property
    def privacy_dir(self) -> Path:
        """Where the simulated clients' privacy ledgers are."""
        return self.path / "privacy"

    @property
    def clients_dir(self) -> Path:
        """Where simulated clients keep what they do not send."""
        return self.path / "clients"

    @property
    def report(self) -> Path:
        """Where the report goes, one HTML file."""
        return self.path / "report.html"

    @property
    def adapter_dir(self) -> Path:
        """Where the final adapter goes, in PEFT's format."""
        return self.path / "adapter"

    @property
    def last_adapter_dir(self) -> Path:
        """Where the last round's adapter goes if `adapter_dir` has that of another round."""
        return self.path / "adapter-last"

    @property
    def unverified(self) -> bool:
        """Whether the run came to its end with an adapter that could not be verified."""
        return self.finished and not self.adapter_dir.is_dir() and unverified(self.adapter_dir).is_dir()

    # ------------------------------------------------------------------------------------------ small files

    def write_json(self, name: str, value: object) -> Path:
        """Write `value` to file `name`, indented, atomically.

        Raises:
            PrivacyError: a private run may not write it.
        """
        if self._may is not None:
            self._may.require_json(name, value)
        text = json.dumps(plain(value), indent=2, allow_nan=False)
        write_atomically(self.path / name, (text + "\n").encode())
        return self.path / name

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote, or None where there is no such file."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunDirError(
                f"{str(self.path / name)!r} is damaged ({error}): remove it, or the whole run", code="file-damaged"
            ) from None

    @property
    def changes(self) -> list[Change]:
        """What resumes changed in the config, in the order of the rounds."""
        return changes_of(self.read_json(CHANGES))

    def note_environment(self, **facts: object) -> None:
        """Add facts that are only known later, such as the kernels that were chosen."""
        self.write_json("environment.json", {**(self.read_json("environment.json") or {}), **facts})

    # ------------------------------------------------------------------------------------------ what it stands on

    @property
    def provenance(self) -> Provenance:
        """What the run was made with, as far as it says."""
        return Provenance.read(self.read_json(PROVENANCE))

    def pin(self, found: Provenance) -> None:
        """Write what the run stands on, once; afterwards compare it.

        Raises:
            RunDirError: see `require`.
        """
        self.require(found)
        self.write_json(PROVENANCE, {**found.known, **self.provenance.known})

    def require(self, found: Provenance, cure: str = RESUME_CURE) -> None:
        """Raise `RunDirError`, naming what changed, unless the run was made with what a command has found.

        Args:
            found: now; parts that it does not know are not compared.
            cure: what to do about it.
        """
        require_provenance(self.provenance, found, repr(str(self.path)), cure)

    # ------------------------------------------------------------------------------------------ rounds

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line of metrics; see `MetricsLog.append`.

        Raises:
            PrivacyError: a private run may not write it.
        """
        if self._may is not None:
            self._may.require_record(record, self.measured)
        self._log.append(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics, oldest first."""
        return self._log.read()

    @property
    def kept_round(self) -> int:
        """The round whose model is kept: of a finished run that selected one the best, or else the last."""
        return int((self.read_json("result.json") or {}).get("kept_round", self.rounds_done))

    def kept_checkpoint(self) -> GlobalState | None:
        """The state after `kept_round`; None where there is none (yet)."""
        latest = self.checkpoints.latest()
        return latest if latest is None or latest.round == self.kept_round else self.checkpoints.best()

    def resume(self) -> GlobalState | None:
        """Make the folder ready to go on: the newest checkpoint, the metrics cut back to its round, the config of now.

        Returns:
            The state to go on from, or None where no round was completed (start from the beginning).
        """
        remove_unfinished(self.path)
        for folder in self.path.glob(f".{self.adapter_dir.name}*"):  # exports that a kill cut short
            shutil.rmtree(folder, ignore_errors=True)
        state = self.checkpoints.latest()
        if state is None and (self.path / "result.json").is_file():
            raise RunDirError(
                f"the checkpoints of {str(self.path)!r} were removed, so that it cannot be resumed: start a new run "
                "with --set name=...",
                code="checkpoints-removed",
            )
        done = -1 if state is None else state.round
        self._log.truncate(done)
        changes = record(self.changes, load_config(self.path / "config.toml"), self.config, max(done, 0))
        if state is not None and (changes or self.changes):
            self.write_json(CHANGES, [change.json for change in changes])
        (self.path / "result.json").unlink(missing_ok=True)
        write_atomically(self.path / "config.toml", self.config.with_absolute_paths().to_toml().encode())
        resumed = (self.read_json("environment.json") or {}).get("resumed", [])
        here = {"round": 0 if state is None else state.round, **describe_environment(self.config)}
        self.note_environment(resumed=[*resumed, here])
        return state

    def slim(self, keep: Keep) -> None:
        """Remove what a finished run needs no longer; it cannot go on to more rounds then.

        Args:
            keep: "all": everything; "adapter": no checkpoints; "metrics": no adapter either.
        """
        if keep == "all" or not self.finished:
            return
        names = ["checkpoints", "merges"]
        if keep == "metrics":
            names += ["adapter", unverified(self.adapter_dir).name, "adapter-last", self.clients_dir.name]
        for name in names:
            shutil.rmtree(self.path / name, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ an earlier run

    def discard_if_untrained(self) -> bool:
        """Remove the folder of a new run that failed before its first round, so that the next start finds it free.

        A folder is kept that holds a round, whatever became of it, or a privacy ledger.

        Returns:
            Whether it was removed.
        """
        try:
            trained = any(record["round"] > 0 for record in self.read_metrics()) or self.rounds_done > 0
        except (FedloraError, OSError, KeyError, TypeError, ValueError):
            return False  # something stands there that cannot be read: not ours to judge
        if trained or (self.privacy_dir.is_dir() and any(self.privacy_dir.iterdir())):
            return False
        with suppress(OSError):
            remove_run(self.path)
        return True


def _why_not(changed: Sequence[str]) -> str:
    if "partition.clients" in changed:
        return "another number of clients divides all examples anew (only nodes with data of their own can join): "
    return "resume with the config that it has, or "


def _both(left: RunConfig, right: RunConfig, keys: Sequence[str]) -> str:
    one, other = flat_keys(left), flat_keys(right)
    return ", ".join(f"{key} was {one.get(key)!r} and is now {other.get(key)!r}" for key in keys)
