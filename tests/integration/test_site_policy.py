"""A site's policy: each clause refuses a run that passes it, and lets one through that does not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from support.errors import raises
from support.tiny_federations import MakeConfig

from fedlora.aggregators import load_aggregator
from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError
from fedlora.federation.client_pool import ClientInfo, RoundRequest
from fedlora.federation.planner import Held, Planner
from fedlora.federation.protocol import PROTOCOL
from fedlora.flower import client_app
from fedlora.flower.handshake import question
from fedlora.flower.messages import HeldParts, RequestEncoder, decode_head
from fedlora.flower.server_app import serve
from fedlora.flower.task_identity import task_identity
from fedlora.node_worker.gated_app import GatedApp
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import Ledger
from fedlora.runs.rundir import RunDir
from fedlora.site.approvals import Approvals, config_hash
from fedlora.site.policy import Policy
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.workspace import open_workspace

EXAMPLES = 60
PRIVATE = (
    *("server.weighting=uniform", "privacy.public_examples=40", "privacy.delta=1e-3", "privacy.max_grad_norm=0.5"),
    *("privacy.accountant=rdp", "privacy.epsilon=8.0", "train.steps=2", "train.batch_size=10"),
)
AT_CLIENTS = ("evaluation.on=both", "evaluation.min_examples=2", "data.test_fraction=0.3")
MakeSite = Callable[..., Path]


@pytest.fixture
def own(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> MakeConfig:
    """The config of a run of nodes that bring their data."""
    rows = tiny_csv.read_text(encoding="utf-8").splitlines()
    (tmp_path / "test.csv").write_text("\n".join(rows[:60]))

    def make(*overrides: str) -> RunConfig:
        fixed = [
            *("data.source=nodes", "partition.name=nodes", "partition.clients=2", f"model.name='{tiny_bert}'"),
            *("adapter.targets=['query','value']", "adapter.rank=4", "task.name=text-classification", "rounds=2"),
            *("task.labels=['negative','positive']", f"data.test='{tmp_path}/test.csv'", f"output='{tmp_path}/runs'"),
            *("runtime.threads=1", "runtime.kernels=off", "runtime.cohort=1", "train.lr=0.01", "model.dtype=float32"),
        ]
        given = {one.partition("=")[0] for one in overrides}
        return parse_config("", [*(one for one in fixed if one.partition("=")[0] not in given), *overrides], name="own")

    return make


@pytest.fixture
def site(own: MakeConfig, tiny_csv: Path, tmp_path: Path) -> MakeSite:
    """Makes a site's folder; its policy knows the base model, which is a path here."""
    config = own()
    known = {config.model.name: open_workspace(config).base.fingerprint}

    def make(number: int = 0, **policy: Any) -> Path:
        folder = tmp_path / f"site-{number}"
        folder.mkdir(exist_ok=True)
        head, *rows = tiny_csv.read_text(encoding="utf-8").splitlines()
        mine = rows[60 + EXAMPLES * number :][:EXAMPLES]
        (folder / "data.csv").write_text("\n".join([head, *mine]) + "\n")
        facts = {"partition-id": number, "data": f"{folder}/data.csv", "ledger": f"{folder}/ledger.jsonl"}
        (folder / "node-config.toml").write_text(tomli_w.dumps(facts))
        (folder / "policy.toml").write_text(tomli_w.dumps({"base_models": known, **policy}))
        return folder

    return make


def ask(folder: Path, config: RunConfig, kind: str, content: RecordDict) -> RecordDict:
    with task_identity(7, 9):
        message = Message(content, 9, kind, ttl=600.0)
        return GatedApp(folder)(message, Context(7, 9, {}, RecordDict(), {"toml": config.to_toml()})).content


def hello(folder: Path, config: RunConfig) -> dict[str, Any]:
    return decode_head(ask(folder, config, "query.hello", question(config, open_workspace(config).pins)))


def request(config: RunConfig, number: int = 1, client_id: int = 0, parts: tuple[str, ...] = ()) -> RecordDict:
    workspace, rule = open_workspace(config), load_aggregator(config.strategy.name, config.strategy.fields)
    state = rule.init(workspace.base.initial_adapter(config.seed), seed=1)
    planned = Planner(config, rule, workspace, run="ab" * 16).request(
        RoundRequest(number, [client_id], state), ClientInfo(client_id), Held()
    )
    return RequestEncoder().encode(planned, parts)


def train(folder: Path, config: RunConfig, number: int = 1) -> RecordDict:
    return ask(folder, config, "train", request(config, number))


def refusal(clause: str) -> str:
    return f"this site's policy does not allow it: {clause}"


# ------------------------------------------------------------------------------------------------ each clause

CLAUSES = {
    "private_only": ({"private_only": True}, (), PRIVATE),
    "private_only, of what the server adds": (
        {"private_only": True},
        (
            *("privacy.unit=client", "privacy.clip_norm=1.0", "privacy.delta=1e-3", "privacy.noise_multiplier=1.0"),
            *("server.aggregation_error=false", "server.max_norm_ratio=off"),
        ),
        PRIVATE,
    ),
    "epsilon": ({"private_only": True, "epsilon": 7.0, "delta": 0.01}, PRIVATE, (*PRIVATE, "privacy.epsilon=7.0")),
    "delta": ({"private_only": True, "epsilon": 9.0, "delta": 1e-4}, PRIVATE, (*PRIVATE, "privacy.delta=1e-4")),
    "rules": ({"rules": ["fedavg"]}, ("strategy.name=ffa",), ()),
    "rules, by claim": ({"rules": ["ROBUST"]}, ("strategy.name=fedavg",), ("strategy.name=median",)),
    "tasks": ({"tasks": ["causal-lm"]}, (), None),
    "code": ({"code": []}, ("task.name=my_module:Mine",), None),
    "code, of a rule within another": ({}, ("strategy={name='krum',inner={name='my_module:Mine'}}",), None),
    "code, of a metric": ({}, ("evaluation.metric=my_module:mine",), ()),
    "code, of a training loop": ({}, ("train.loop=my_module:train", "train.lr=1e-3"), ()),
    "code, that a model brings": ({}, ("model.trust_remote_code=true",), ()),
    "columns": ({"columns": ["text", "label"]}, ("data.domain=domain",), ()),
    "columns, by role": ({"columns": ["text", "label"]}, ("data.text=document",), ()),
    "max_rank": ({"max_rank": 4}, ("adapter.rank=5",), ()),
    "max_rank, of this client": (
        {"max_rank": 4},
        ("clients.ranks=[5,4]", "strategy.name=flora"),
        ("clients.ranks=[4,5]", "strategy.name=flora"),
    ),
    "max_rounds": ({"max_rounds": 2}, ("rounds=3",), ()),
    "max_steps": ({"max_steps": 5}, ("train.steps=6",), ("train.steps=5",)),
    "max_steps, of a pass": ({"max_steps": 5}, ("train.batch_size=10",), ("train.batch_size=12",)),
    "max_steps, of a private pass": (
        {"max_steps": 4},
        (*PRIVATE, "train.steps=", "train.batch_size=8"),
        (*PRIVATE, "train.steps=", "train.batch_size=10"),
    ),
    "min_examples": ({"min_examples": EXAMPLES + 1}, (), None),
    "min_examples, enough": ({"min_examples": EXAMPLES}, None, ()),
    "min_examples, as declared": (
        {"min_examples": 41},
        PRIVATE,
        (*PRIVATE, f"privacy.public_examples={EXAMPLES + 100}"),
    ),
    "example_counts": ({"example_counts": False}, (), ("server.weighting=uniform",)),
    "sources": ({}, ("data.source=vader", "partition.name=iid"), ()),
}  # fmt: skip
"""Name -> policy, changes of a run that it refuses, and of one that it lets through."""


ELSEWHERE = {"approval", "base_models", "losses", "metrics", "signers", "message_mb"}
"""Clauses whose refusals are in tests of their own, here and in test_site_log.py."""


def test_no_clause_is_without_its_refusal() -> None:
    assert {name.partition(",")[0] for name in CLAUSES} | ELSEWHERE == set(Policy.model_fields)


@pytest.mark.parametrize("name", CLAUSES)
def test_a_clause_refuses_and_lets_through(name: str, own: MakeConfig, site: MakeSite) -> None:
    clause = name.partition(",")[0]
    policy, refused, allowed = CLAUSES[name]
    folder = site(**policy)
    if refused is not None:
        config = own(*refused)
        content = question(own(), open_workspace(own()).pins)
        assert decode_head(ask(folder, config, "query.hello", content)) == {
            "protocol": PROTOCOL,
            "kind": "error",
            "error": refusal(clause),
        }
    if allowed is not None:
        assert hello(folder, own(*allowed))["kind"] == "hello"


def test_a_base_model_counts_by_its_fingerprint(own: MakeConfig, site: MakeSite, caplog: Any) -> None:
    config = own()
    with caplog.at_level(logging.WARNING):
        for known in ({}, {config.model.name: "0" * 64}):
            assert hello(site(base_models=known), config)["error"] == refusal("base_models")
    assert open_workspace(config).base.fingerprint in caplog.text
    assert hello(site(), config)["kind"] == "hello"
    folder = site()
    (folder / "policy.toml").write_text("")  # a path is no name
    assert hello(folder, config)["error"] == refusal("base_models")


@pytest.mark.parametrize("name", ["/etc", "../site-0", "~", "."])
def test_no_path_is_the_coordinators_to_choose(name: str, own: MakeConfig, site: MakeSite) -> None:
    folder = site()
    content = question(own(), open_workspace(own()).pins)
    for override, clause in ((f"model.name='{name}'", "base_models"), (f"data.source='{name}'", "sources")):
        changed = own(override, "partition.name=iid") if clause == "sources" else own(override)
        assert decode_head(ask(folder, changed, "query.hello", content))["error"] == refusal(clause)


def test_a_node_that_takes_its_share_reads_what_is_listed(own: MakeConfig, site: MakeSite, tiny_csv: Path) -> None:
    config = own(f"data.source='{tiny_csv}'", "partition.name=iid", "data.test=")
    for listed, kind in (((), "error"), ((str(tiny_csv),), "hello"), (None, "error")):
        folder = site(**({} if listed is None else {"sources": list(listed)}))
        (folder / "node-config.toml").write_text("partition-id = 0")
        assert hello(folder, config)["kind"] == kind


def test_code_that_is_installed_and_listed_is_let_through(
    own: MakeConfig, site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site_code.py").write_text(
        "from dataclasses import dataclass\nfrom fedlora.tasks.text_classification import TextClassification\n"
        "@dataclass(frozen=True)\nclass Mine(TextClassification):\n    '''Ours.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = own("task.name=site_code:Mine")
    assert hello(site(code=["site_code:Mine"]), config)["kind"] == "hello"
    assert hello(site(), config)["error"] == refusal("code")


def test_what_is_asked_counts_not_what_the_config_says_of_it(own: MakeConfig, site: MakeSite) -> None:
    """A request for a later round, or at another rank, than the config announces."""
    config = own("train.steps=1")
    folder = site(max_rounds=2, max_rank=4)
    assert decode_head(train(folder, config, 2))["kind"] == "update"
    late = ask(folder, config, "train", request(config, 3))
    assert decode_head(late)["error"] == refusal("max_rounds")
    large = ask(folder, config, "train", request(own("adapter.rank=8", "train.steps=1")))
    assert decode_head(large)["error"] == refusal("max_rank")


# ------------------------------------------------------------------------------------------------ what leaves


def figures(content: RecordDict) -> set[str]:
    return set(content.metric_records["metrics"])


@pytest.mark.slow
def test_figures_that_may_not_leave_stay(own: MakeConfig, site: MakeSite) -> None:
    config = own("train.steps=1", "server.weighting=uniform")
    everything = {"num_examples", "examples_seen", "loss", "steps", "seconds", "compute_seconds"}
    assert figures(train(site(), config)) == everything
    assert figures(train(site(losses=False), config)) == everything - {"loss"}
    few = train(site(example_counts=False), config)
    assert figures(few) == {"num_examples", "loss"}
    assert few.metric_records["metrics"]["num_examples"] == 1
    assert hello(site(), config)["num_examples"] == EXAMPLES
    assert "num_examples" not in hello(site(example_counts=False), config)


def test_a_rule_that_asks_for_losses_gets_none_where_they_may_not_leave(own: MakeConfig, site: MakeSite) -> None:
    config = own("train.steps=1", "server.weighting=uniform", "strategy.name=qfedavg")
    assert "start_loss" in figures(train(site(), config))
    assert decode_head(train(site(losses=False), config))["error"] == refusal("losses")


def test_steps_of_both_phases_count(own: MakeConfig, site: MakeSite) -> None:
    rule = "strategy={name='fedrep',head_times=2}"
    config = own("train.steps=2", rule, "evaluation.on=both", "server.weighting=uniform")
    assert decode_head(train(site(max_steps=6), config))["kind"] == "update"
    assert decode_head(train(site(max_steps=5), config))["error"] == refusal("max_steps")


@pytest.mark.slow
def test_a_private_runs_figures_are_the_plans_own(own: MakeConfig, site: MakeSite) -> None:
    config = own(*PRIVATE)
    reply = train(site(private_only=True, losses=False, example_counts=False), config)
    assert figures(reply) == {"num_examples", "steps", "sample_rate", "noise_multiplier", "max_grad_norm", "attempts"}
    assert reply.metric_records["metrics"]["num_examples"] == 1


@pytest.mark.parametrize("clause", ["metrics", "losses", "example_counts"])
def test_a_site_evaluates_only_where_all_that_the_sums_hold_may_leave(
    clause: str, own: MakeConfig, site: MakeSite
) -> None:
    config = own(*AT_CLIENTS, "server.weighting=uniform")
    content = request(config, parts=("test",))
    assert decode_head(ask(site(), config, "evaluate", content))["kind"] == "sums"
    assert decode_head(ask(site(**{clause: False}), config, "evaluate", content))["error"] == refusal(clause)
    apart = round(0.3 * EXAMPLES)
    assert decode_head(ask(site(min_examples=apart - 3), config, "evaluate", content))["kind"] == "sums"
    few = ask(site(min_examples=apart + 3), config, "evaluate", content)
    assert decode_head(few)["error"] == refusal("min_examples")


def test_an_error_about_the_data_tells_no_row(own: MakeConfig, site: MakeSite, caplog: Any) -> None:
    folder = site()
    (folder / "data.csv").write_text("text,label\na film,secret-diagnosis\n")
    content = question(own(), open_workspace(own()).pins)
    with caplog.at_level(logging.WARNING):
        said = decode_head(ask(folder, own(), "query.hello", content))["error"]
    assert "its own log" in said
    assert "secret-diagnosis" not in said
    assert "secret-diagnosis" in caplog.text
    (folder / "data.csv").write_text("text,diagnosis\na film,x\n")  # the header holds no row
    assert "label" in decode_head(ask(folder, own(), "query.hello", content))["error"]


def test_a_server_of_another_kind_is_held_to_the_same(own: MakeConfig, site: MakeSite) -> None:
    from fedlora.flower.peft_records import record_of

    config = own("train.steps=1")
    adapter = open_workspace(config).base.initial_adapter(config.seed)
    names = {n.replace(":A", ".lora_A.weight").replace(":B", ".lora_B.weight"): t for n, t in adapter.tensors().items()}
    content = RecordDict({"arrays": record_of(names), "config": ConfigRecord({"server-round": 1})})
    assert "metrics" in ask(site(), config, "train", content)
    for policy in ({"rules": ["fedavg"]}, {"losses": False}, {"example_counts": False}, {"private_only": True}):
        refused = ask(site(**policy), own("train.steps=1", "server.weighting=uniform"), "train", content)
        assert decode_head(refused)["error"] == refusal(next(iter(policy)))


# ------------------------------------------------------------------------------------------------ the caps


@pytest.mark.slow
def test_all_runs_together_stay_below_the_sites_epsilon(own: MakeConfig, site: MakeSite) -> None:
    """Runs that name their noise and no budget: each alone would be allowed."""
    config = own(*(one for one in PRIVATE if "epsilon" not in one), "privacy.noise_multiplier=1.5")
    folder, heads = site(private_only=True, epsilon=3.0, delta=1e-3), []
    while not heads or heads[-1]["kind"] == "update":
        assert len(heads) < 20
        changed = config.model_copy(update={"seed": len(heads)})  # a request that no kept answer fits
        heads.append(decode_head(ask(folder, changed, "train", request(changed))))
    ledger = Ledger(folder / "ledger.jsonl")
    (entry,) = ledger.entries()
    assert heads[-1] == {"protocol": PROTOCOL, "kind": "spent", "error": refusal("epsilon")}
    assert len(heads) > 2
    assert ledger.epsilon(1e-3) <= 3.0 < epsilon([replace(entry, steps=entry.steps + 2)], 1e-3)


@pytest.mark.slow
def test_the_ledger_holds_the_sites_cap_at_the_sites_delta(own: MakeConfig, site: MakeSite) -> None:
    """A run that names no epsilon, only noise, is capped too."""
    config = own(*(one for one in PRIVATE if "epsilon" not in one), "privacy.noise_multiplier=0.6")
    folder = site(private_only=True, epsilon=1.0, delta=1e-3)
    assert decode_head(train(folder, config))["error"] == refusal("epsilon")
    assert not (folder / "ledger.jsonl").exists()


# ------------------------------------------------------------------------------------------------ approvals


def test_a_run_starts_when_its_very_config_was_approved(own: MakeConfig, site: MakeSite) -> None:
    config, folder = own(), site(approval=True)
    approvals, digest = Approvals(folder), config_hash(config)
    assert hello(folder, config)["error"] == refusal("approval")
    assert approvals.waiting() == [digest]
    assert approvals.text(digest[:8]) == config.to_toml()
    assert approvals.approve(digest[:8]) == digest
    assert hello(folder, config)["kind"] == "hello"
    assert hello(folder, own("train.lr=0.02"))["error"] == refusal("approval")


def test_a_run_that_the_policy_forbids_does_not_wait_for_approval(own: MakeConfig, site: MakeSite) -> None:
    folder = site(approval=True, max_rounds=1)
    assert hello(folder, own())["error"] == refusal("max_rounds")
    assert Approvals(folder).waiting() == []


# ------------------------------------------------------------------------------------------------ what comes in


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"plan": ConfigRecord({"json": "["})}),
        RecordDict({"plan": ConfigRecord({"json": "{}"})}),
        RecordDict(
            {
                "plan": ConfigRecord(
                    {"json": json.dumps({"protocol": PROTOCOL, "wire": "float32", "round": "x", "layout": {}})}
                )
            }
        ),
        RecordDict({"plan": MetricRecord({"json": 1})}),
        RecordDict({"plan": ConfigRecord({"json": "[" * 100_000})}),
        RecordDict({"a": ArrayRecord(), "b": ArrayRecord()}),
    ],
)
def test_a_message_that_is_none_is_answered_in_words(content: RecordDict, own: MakeConfig, site: MakeSite) -> None:
    folder, config = site(), own()
    assert decode_head(ask(folder, config, "train", content))["error"] == "the message has no readable head"
    assert "types" in decode_head(ask(folder, config, "query.data", content))["error"]


def test_nothing_but_the_config_counts_of_what_comes_beside_a_message(
    own: MakeConfig, site: MakeSite, tmp_path: Path
) -> None:
    folder, config = site(private_only=True), own(*PRIVATE)
    theirs = {"partition-id": 1, "data": "/etc/passwd", "ledger": f"{tmp_path}/theirs.jsonl", "evil": 1}
    run = {"toml": config.to_toml(), "ledger-dir": str(tmp_path), "set": "privacy.epsilon=99", "config": "/etc/passwd"}
    with task_identity(7, 9):
        message = Message(request(config), 9, "train", ttl=600.0)
        reply = GatedApp(folder)(message, Context(7, 9, theirs, RecordDict(), run))
    assert decode_head(reply.content)["kind"] == "update"
    assert (folder / "ledger.jsonl").is_file()
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("text", ["", "x" * (1 << 19), "rounds = 'many'", "[data]\nown = '/etc/passwd'"])
def test_a_config_that_is_none_is_refused(text: str, own: MakeConfig, site: MakeSite) -> None:
    with task_identity(7, 9):
        message = Message(RecordDict(), 9, "query.hello", ttl=600.0)
        reply = GatedApp(site())(message, Context(7, 9, {}, RecordDict(), {"toml": text}))
    assert decode_head(reply.content)["kind"] == "error"


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ("partition-id = 0\nepsilon = 9.0\ndelta = 0.1", "not-of-the-node"),
        ('partition-id = 0\nworker = "/a"', "not-of-the-node"),
        ('partition-id = 0\ndaat = "/a"', "unknown-key"),
        ('data = "/a"', "no-client-number"),
        ("=", "file-not-readable"),
    ],
)
def test_a_node_config_that_a_gate_cannot_go_by_is_refused_at_its_start(facts: str, code: str, site: MakeSite) -> None:
    folder = site()
    (folder / "node-config.toml").write_text(facts)
    with raises(ConfigError, code):
        GatedApp(folder)


def test_while_the_policy_cannot_be_read_nothing_is_allowed(own: MakeConfig, site: MakeSite) -> None:
    config, folder = own(), site(max_rounds=9)
    gate, policy = GatedApp(folder), (folder / "policy.toml").read_text()
    for text, kind in (("max_rnds = 77", "error"), (policy, "hello")):
        (folder / "policy.toml").write_text(text)
        with task_identity(7, 9):
            message = Message(question(config, open_workspace(config).pins), 9, "query.hello", ttl=600.0)
            head = decode_head(gate(message, Context(7, 9, {}, RecordDict(), {"toml": config.to_toml()})).content)
        assert head["kind"] == kind
        assert head.get("error", refusal("policy.toml")) == refusal("policy.toml")


# ------------------------------------------------------------------------------------------------ a federation


class ByNode(ClientApp):
    """Node k runs app k."""

    def __init__(self, apps: dict[int, ClientApp]) -> None:
        super().__init__()
        self._apps = apps

    def __call__(self, message: Message, context: Context) -> Message:
        return self._apps[context.node_id](message, context)


def test_a_site_that_forbids_the_run_is_left_out_by_name(own: MakeConfig, site: MakeSite, tmp_path: Path) -> None:
    config = own("train.steps=1", "server.node_timeout_s=1")
    apps: dict[int, ClientApp] = {2: GatedApp(site(0)), 3: GatedApp(site(1, max_rounds=1))}
    client_app.held_parts = HeldParts()
    grid = LoopbackGrid(ByNode(apps), [{}, {}], {"toml": config.to_toml()})
    with task_identity(1):
        outcome = serve(grid, config, RunDir.create(config, overwrite=True), resume=False)
    last = outcome.records[-1]
    assert last["answered"] == [0]
    assert refusal("max_rounds") in json.dumps(last["turned_away"])
