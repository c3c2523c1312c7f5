"""What of a run would fail on this machine, before its first round: for `fedlora deploy doctor`.

On a node the site's policy comes first, as it does in its worker: of a config that it refuses nothing is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, PolicyError, PrivacyError
from fedlora.site import node_facts
from fedlora.site.approvals import Approvals, config_hash
from fedlora.site.audit_log import AUDIT_LOG, read_log
from fedlora.site.gate import refused, require_config, require_signature
from fedlora.site.policy import Policy, load_policy


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: It, and what was found.
        cure: What to do; "" where nothing is wrong.
    """

    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"FAULT  {self.what}: {self.cure}" if self.cure else f"ok     {self.what}"


@dataclass(frozen=True)
class Run:
    """A run as the machines read it.

    Args:
        config: The run's.
        signature: That comes with it; "" for none.
        code: Digest of the source of this machine's fedlora.
    """

    config: RunConfig
    signature: str = ""
    code: str = ""


def at_coordinator(run: Run) -> Iterator[Finding]:
    """Of the server's model and test file."""
    config = run.config
    yield _tried("the run's base model", lambda: _base_model(config))
    if config.data.test is not None:
        yield _tried(f"the server's test file {config.data.test}", lambda: _columns(config, config.data.test))


def at_site(site: Path, run: Run | None) -> Iterator[Finding]:
    """Of a site's files, and of a run there.

    Args:
        site: The site's folder.
        run: None: the site alone is looked at.
    """
    if (site / AUDIT_LOG).is_file():
        yield _tried("the audit log", lambda: f"has {len(read_log(site).records)} lines, each as it was written")
    try:
        policy = load_policy(site)
        facts = node_facts(site, "partition-id")
    except FedloraError as error:
        yield Finding("the site's policy and node config", str(error))
        return
    yield Finding("the site's policy and node config can be read")
    data, ledger = facts.get("data"), facts.get("ledger")
    if run is None:
        yield Finding("no run was looked at (--run FILE names the run.toml that the coordinator will start)")
        return
    client_id = int(facts["partition-id"])
    try:
        _require_allowed(policy, site, run, client_id, own_data=data is not None)
    except PolicyError as error:
        yield Finding(f"the policy does not allow the run: {error.clause}", error.why)
        return
    except FedloraError as error:
        yield Finding("the run on this node", str(error))
        return
    yield Finding("the policy allows the run")
    config = run.config
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"own": str(data)})})
    yield (model := _tried("the run's base model", lambda: _base_model(config, policy)))
    if model.cure:
        return
    yield _tried("the node's data" if data is None else f"the data file {data}", lambda: _readable(config))
    if config.example_privacy is not None:
        yield _tried("the privacy ledger", lambda: _ledger(config, ledger, policy, client_id))


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(f"{what} {look()}")
    except FedloraError as error:
        return Finding(what, error.why if isinstance(error, PolicyError) else str(error))


def _require_allowed(policy: Policy, site: Path, run: Run, client_id: int, *, own_data: bool) -> None:
    """Raise what the worker would refuse by the config alone."""
    clients = run.config.partition.fields.get("clients")
    if isinstance(clients, int) and client_id >= clients:
        raise ConfigError(
            f"its partition-id is {client_id}, and the run has {clients} clients, numbered from 0: correct "
            "node-config.toml, or start the run with more clients",
            code="no-such-client",
        )
    require_signature(policy, run.signature, run.config, run.code)
    require_config(policy, run.config, client_id, own_data=own_data)
    if policy.approval and (digest := config_hash(run.config)) not in Approvals(site).approved():
        raise refused(
            "approval", f"config {digest} waits, or will: once the run has asked, fedlora node approve {site} {digest}"
        )


def _base_model(config: RunConfig, policy: Policy | None = None) -> str:
    """What is said of the base model's weights on this machine."""
    from fedlora.assets import Checkpoint
    from fedlora.model.fingerprint import fingerprint

    found = fingerprint(Checkpoint.of(config.model))
    wanted = None if policy is None or policy.base_models is None else policy.base_models.get(config.model.name)
    if wanted is not None and wanted != found:
        raise refused("base_models", f"its fingerprint is {found}, and the policy names {wanted}")
    return f"{config.model.name} has the fingerprint {found}"


def _columns(config: RunConfig, file: str | None) -> str:
    own = config.model_copy(update={"data": config.data.model_copy(update={"own": file})})
    return _readable(own)


def _readable(config: RunConfig) -> str:
    from fedlora.data.own import require_readable

    require_readable(config)
    return "can be read, with the columns that the task needs"


def _ledger(config: RunConfig, path: object, policy: Policy, client_id: int) -> str:
    """What is said of the ledger; PrivacyError or PolicyError where it does not allow a round."""
    from fedlora.privacy.ledger import Ledger
    from fedlora.training.dp_settings import private_settings, require_privacy

    if not path:
        raise PrivacyError('node-config.toml names none: add ledger = "/where/it/is/kept.jsonl"', code="no-ledger")
    privacy, ledger, settings = require_privacy(config), Ledger(str(path)), private_settings(config, client_id)
    spent = ledger.epsilon(privacy.delta, privacy.accountant)
    for whose, budget in (("run's", settings.budget), ("policy's", policy.budget)):
        if budget is not None and not ledger.affords(settings.entry, budget):
            raise refused(
                "epsilon",
                f"it stands at epsilon {spent:.3f}, and one round more would pass the {whose} {budget.epsilon:g}: "
                "nothing more can be trained on these data within it",
            )
    return f"stands at epsilon {spent:.3f} at delta {privacy.delta:g}"
