"""The ClientApp of a node whose worker is its gate: `client_app` behind the site's policy.

Of what comes over the socket the message and the text of the run's config count, both data. Where the examples, the
ledger and the socket are, what the client's number is, and what may be done, the site's folder says alone.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, final

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError, DeployError, PolicyError, ReplyError, WorkerError
from fedlora.federation.client_pool import Failure
from fedlora.federation.discretion import failure_of, looking_at_data
from fedlora.flower import client_app
from fedlora.flower.app_config import client_id_of, config_of, require_node_config
from fedlora.flower.messages import decode_head, decode_request_head, encode_note
from fedlora.flower.plain_client import is_plain
from fedlora.hashing import code_digest
from fedlora.node_worker.audit_entries import of_answer, of_ledger, of_request, of_run
from fedlora.privacy.ledger import Ledger
from fedlora.site import NODE_CONFIG, node_facts
from fedlora.site.approvals import Approvals, config_hash
from fedlora.site.audit_log import AuditLog
from fedlora.site.gate import (
    figures_kept_here,
    refused,
    require_config,
    require_foreign,
    require_request,
    require_signature,
    require_workspace,
)
from fedlora.site.policy import POLICY, Policy, load_policy
from fedlora.training.workspace import open_workspace

logger = logging.getLogger(__name__)

MAX_CONFIG = 1 << 18
"""Characters of a run's config."""
UNLOGGED = "this site cannot write its audit log, and answers nothing without it"
"""All that is said when a request or its answer could not be written down."""
KINDS = ("query.hello", "train", "evaluate")
"""Types of the messages that are answered."""


@final
class GatedApp(ClientApp):
    """Answers what the policy of a site allows.

    Args:
        site: Folder of the site (`fedlora.site`).
        device: Device for all computation, in place of the one in the node's own config.

    Raises:
        ConfigError: a file of the site is missing or wrong.
        DeployError: its audit log is damaged, or cannot be written.
    """

    def __init__(self, site: Path, device: str | None = None) -> None:
        super().__init__()
        self.site = site.absolute()
        self.policy = load_policy(self.site)
        self._log = AuditLog(self.site)
        self._facts = _node_config(self.site)
        if device is not None:
            self._facts["device"] = device

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message, with a line in the audit log before anything is done and one before the answer leaves.

        Raises:
            RuntimeError: an error that nobody foresaw, of which the log has the details.
        """
        facts: dict[str, Any] = {}
        try:
            facts["request"] = self._log.write("request", of_request(message, context))
            try:
                content = self._answered(message, context, facts)
            except RuntimeError:
                self._log.write("answer", {**facts, "kind": "none: it failed"})
                raise
            self._log.write("answer", {**facts, **of_answer(message.content, content)})
        except DeployError as error:
            logger.error("%s; nothing is answered", error)
            content = encode_note("error", error=UNLOGGED)
        return Message(content, reply_to=message)

    def refuse(self, size: int, error: WorkerError) -> None:
        """Write down that what came was no message, or one of another fedlora's.

        Args:
            size: Of what came, in bytes.
            error: Why it is refused.
        """
        try:
            asked = self._log.write("request", {"type": "none", "bytes": size})
            self._log.write("answer", {"request": asked, "kind": "none", "refused": error.code, "why": str(error)})
        except DeployError as unlogged:
            logger.error("%s", unlogged)

    def _answered(self, message: Message, context: Context, facts: dict[str, Any]) -> RecordDict:
        """The content of an answer; what the audit log is to say of it beside is added to `facts`.

        Raises:
            RuntimeError: see `__call__`.
        """
        config: RunConfig | None = None
        try:
            policy = self._read_policy()
            if message.metadata.message_type not in KINDS:
                raise ReplyError(f"a node answers messages of the types {', '.join(KINDS)}", code="unknown-kind")
            text = str(context.run_config.get("toml", ""))
            config = _parsed(text)
            facts |= of_run(config)
            own = Context(context.run_id, context.node_id, self._own_facts(policy), RecordDict(), {"toml": text})
            facts |= self._require(policy, config, message, own, str(context.run_config.get("signature", "")))
            reply = client_app.app(message, own)
            return _without(reply.content, policy, config)
        except PolicyError as error:
            logger.warning("run %d is refused: %s: %s", context.run_id, error.clause, error.why)
            facts |= {"refused": error.clause, "why": error.why}
            return encode_note("error", error=str(error))
        except Exception as error:
            found = failure_of(error, config)
            if not isinstance(found, Failure):
                logger.exception("a request failed")
                raise RuntimeError("it failed: see its own log") from None
            logger.warning("a request failed: %s", found.why)
            return encode_note("error", error=found.why)
        finally:
            facts |= of_ledger(str(self._facts.get("ledger", "")), self._log.ledger, config)

    def _read_policy(self) -> Policy:
        """The policy as it is now.

        Raises:
            PolicyError: it cannot be read: nothing is allowed then.
        """
        try:
            self.policy = load_policy(self.site)
        except ConfigError as error:
            raise refused(POLICY, str(error)) from None
        return self.policy

    def _own_facts(self, policy: Policy) -> dict[str, Any]:
        cap = policy.budget
        return self._facts if cap is None else {**self._facts, "epsilon": cap.epsilon, "delta": cap.delta}

    def _require(
        self, policy: Policy, config: RunConfig, message: Message, own: Context, signature: str
    ) -> dict[str, Any]:
        """Hold a message against the policy, and the site's ledger against the audit log.

        Returns:
            Who signed the run, where the policy asks for it.

        Raises:
            PolicyError: the policy does not allow what is asked.
            FedloraError: what is asked cannot be done.
        """
        signer = require_signature(policy, signature, config, code_digest())
        if config.example_privacy is not None and "ledger" in self._facts:
            Ledger(str(self._facts["ledger"])).require_head(self._log.ledger)
        client_id, evaluates = client_id_of(own), message.metadata.message_type == "evaluate"
        first_times = 0
        require_config(policy, config, client_id, own_data="data" in self._facts)
        if policy.approval and not Approvals(self.site).allows(config):
            digest = config_hash(config)
            raise refused("approval", f"read it with fedlora node show {self.site} {digest}, then fedlora node approve")
        if message.metadata.message_type == "train" and is_plain(message):
            require_foreign(policy)
        elif message.metadata.message_type != "query.hello":
            try:
                head = decode_request_head(message.content)
                require_request(policy, head, evaluates=evaluates)
                first_times = head.get("first_times", 1) if head.get("first") else 0
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
                raise ReplyError("the message has no readable head", code="unreadable-head") from None
        whole = config_of(own)
        with looking_at_data(whole, always=True):
            workspace = open_workspace(whole)
        require_workspace(policy, workspace, client_id, evaluates=evaluates, first_times=first_times)
        return {} if signer is None else {"signer": signer}


def _parsed(text: str) -> RunConfig:
    if not 0 < len(text) <= MAX_CONFIG:
        raise ConfigError(f"a run's config has 1 to {MAX_CONFIG} characters", code="no-config")
    return parse_config(text)


def _node_config(site: Path) -> dict[str, Any]:
    """A node's own facts.

    Raises:
        ConfigError: the file is missing or not usable.
    """
    facts, path = node_facts(site), site / NODE_CONFIG
    require_node_config(facts)
    for key, cure in (
        ("worker", "it is this worker"),
        ("epsilon", "policy.toml has it"),
        ("delta", "policy.toml has it"),
    ):
        if key in facts:
            raise ConfigError(f"{str(path)!r}: remove {key}: {cure}", code="not-of-the-node")
    client_id_of(Context(0, 0, facts, RecordDict(), {}))
    return facts


def _without(content: RecordDict, policy: Policy, config: RunConfig) -> RecordDict:
    """A reply without what the policy keeps here."""
    if isinstance(figures := content.get("metrics"), MetricRecord):
        kept = figures_kept_here(policy, config)
        let_out = {name: value for name, value in figures.items() if name not in kept}
        if not policy.example_counts and config.privacy is None:
            let_out["num_examples"] = 1
        return RecordDict({**content, "metrics": MetricRecord(let_out)})
    if not policy.example_counts and "num_examples" in (head := decode_head(content)):
        fields = {key: value for key, value in head.items() if key not in ("protocol", "kind", "num_examples")}
        return encode_note(head["kind"], **fields)
    return content
