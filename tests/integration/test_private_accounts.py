"""What a private run may claim, and what its nodes spend: foreign and lost ledgers, crashes, hostile servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app.user_config import UserConfig
from support import federations
from support.errors import raises
from support.tiny_federations import MakeConfig

from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import PrivacyError
from fedlora.federation import private_client
from fedlora.federation.client_ledger import ledger_path
from fedlora.federation.example_level_account import ExampleLevelAccount
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.app_config import config_of
from fedlora.flower.arrays import from_array, to_array
from fedlora.flower.task_identity import task_identity
from fedlora.hash_chain import START
from fedlora.hashing import tensors_digest
from fedlora.privacy import ledger as ledgers
from fedlora.privacy.ledger import Attempt, Ledger
from fedlora.runs.checkpoints import Checkpoints
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training.dp_settings import private_settings
from fedlora.wire_formats import from_raw, joined, raw_bytes, read_layout, sliced

DELTA, ROUNDS = 1e-3, 3


@pytest.fixture
def private(tiny_config: MakeConfig) -> MakeConfig:
    def make(*overrides: str, name: str = "private", noise: str = "noise_multiplier=1.5") -> RunConfig:
        return tiny_config(
            "server.weighting=uniform",
            "server.node_timeout_s=0.05",
            f"evaluation.every={ROUNDS}",
            "partition.clients=2",
            "train.steps=1",
            "train.batch_size=40",
            "privacy.public_examples=40",
            f"privacy.delta={DELTA}",
            "privacy.max_grad_norm=0.5",
            "privacy.accountant=rdp",
            f"privacy.{noise}",
            f"rounds={ROUNDS}",
            *overrides,
            name=name,
        )

    return make


def nodes_of(folder: Path, clients: int = 2) -> list[dict[str, Any]]:
    return [{"partition-id": k, "ledger": str(folder / f"node-{k}.jsonl")} for k in range(clients)]


def deploy(
    config: RunConfig,
    nodes: list[dict[str, Any]],
    rundir: RunDir | None = None,
    folder: Path | None = None,
    run_id: int = 1,
) -> RunOutcome:
    """A federation of nodes that release what they send; `rundir`: resume it, as a new run of Flower's."""
    return federations.deploy(config, nodes=nodes, rundir=rundir, ledgers=folder, run_id=run_id)


def claim(outcome: RunOutcome) -> dict[str, Any]:
    return outcome.rundir.read_json("result.json")["privacy"]


def spent(folder: Path, client: int = 0) -> float:
    return Ledger(folder / f"node-{client}.jsonl").epsilon(DELTA, "rdp")


def events(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def die(
    monkeypatch: pytest.MonkeyPatch,
    config: RunConfig,
    nodes: list[dict[str, Any]],
    number: int,
    of: type = RunDir,
    where: str = "append_metrics",
) -> RunDir:
    """A federation whose server dies in a round, before its line of metrics or after it."""
    real = getattr(of, where)

    def dies(self: Any, what: Any) -> Any:
        if (what["round"] if isinstance(what, dict) else what.round) == number:
            raise KeyboardInterrupt
        return real(self, what)

    with monkeypatch.context() as patch:
        patch.setattr(of, where, dies)
        with pytest.raises(KeyboardInterrupt):
            deploy(config, nodes)
    return RunDir.open(Path(config.output) / config.name)


# ------------------------------------------------------------------------------------------------ the claim


def test_an_empty_folder_of_ledgers_makes_no_claim_smaller(private: MakeConfig, tmp_path: Path) -> None:
    found = deploy(private(), nodes_of(tmp_path), folder=tmp_path / "server-side")
    assert claim(found)["epsilon"] == spent(tmp_path) > 1
    assert claim(found)["source"] == "plan"
    assert [record["epsilon"] for record in found.records[1:]] == sorted(
        record["epsilon"] for record in found.records[1:]
    )
    assert found.records[1]["epsilon"] > 0


def test_ledgers_that_get_lost_make_no_claim_smaller(private: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = claim(run_simulation(private(name="whole"), RunDir.create(private(name="whole")), Callback()))
    assert whole["source"] == "ledgers"
    real = Checkpoints.save

    def loses(self: Checkpoints, state: Any) -> Any:
        if state.round == ROUNDS:
            for k in range(2):
                ledger_path(rundir.privacy_dir, k).unlink()
        return real(self, state)

    monkeypatch.setattr(Checkpoints, "save", loses)
    rundir = RunDir.create(private())
    found = claim(run_simulation(private(), rundir, Callback()))
    assert found["epsilon"] == whole["epsilon"]
    assert found["source"] == "plan"


def test_ledgers_of_others_in_the_same_folder_are_not_this_runs(private: MakeConfig, tmp_path: Path) -> None:
    entry = private_settings(private(), 0).entry
    for client_id, times in ((0, 1), (7, 50)):  # client 0 was in an earlier run; a client 7 this run does not have
        for number in range(times):
            with Ledger(ledger_path(tmp_path, client_id)).spend(entry, run="earlier", round=number) as attempt:
                attempt.release()
    nodes = [{"partition-id": k} for k in range(2)]
    found = claim(deploy(private(), nodes, folder=tmp_path))
    assert found["source"] == "ledgers"
    assert found["epsilon"] == Ledger(ledger_path(tmp_path, 0)).epsilon(DELTA, "rdp")
    assert Ledger(ledger_path(tmp_path, 7)).epsilon(DELTA, "rdp") > found["epsilon"]


def test_where_the_record_of_what_was_asked_is_lost_no_claim_is_made(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_simulation(private(), RunDir.create(private()), Callback())
    (outcome.rundir.privacy_dir / "asked.jsonl").unlink()
    found = ExampleLevelAccount(private(), outcome.rundir).summary(outcome.records)
    assert found["epsilon"] is None
    assert "no epsilon can be stated" in found["statement"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 0.1),
        pytest.param("steps", 9.0, marks=pytest.mark.slow),
        pytest.param("sample_rate", None, marks=pytest.mark.slow),
        pytest.param("attempts", None, marks=pytest.mark.slow),
    ],
)
def test_an_update_that_was_not_made_as_asked_is_refused(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: float | None
) -> None:
    real = private_client._private_figures

    def states(result: Any, one: Any) -> dict[str, float]:
        figures = dict(real(result, one))
        if Path(one.account.ledger.path).name == "node-1.jsonl":
            figures.pop(name)
            figures |= {} if value is None else {name: value}
        return figures

    monkeypatch.setattr(private_client, "_private_figures", states)
    record = deploy(private("rounds=1"), nodes_of(tmp_path)).records[1]
    assert record["answered"] == [0]
    assert "state" in record["refused"]["1"]


def test_a_lost_ledger_of_the_server_makes_no_claim_smaller(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        "train.steps=1", "rounds=2", "server.aggregation_error=false", "evaluation.every=2",
        "privacy.unit=client", "privacy.noise_multiplier=2", f"privacy.delta={DELTA}", "privacy.clip_norm=0.1",
        "privacy.accountant=rdp",
    )  # fmt: skip
    whole = claim(run_simulation(config, RunDir.create(config), Callback()))
    real = Checkpoints.save

    def loses(self: Checkpoints, state: Any) -> Any:
        if state.round == 1:
            (rundir.privacy_dir / "server.jsonl").unlink()
        return real(self, state)

    monkeypatch.setattr(Checkpoints, "save", loses)
    rundir = RunDir.create(config, overwrite=True)
    assert claim(run_simulation(config, rundir, Callback()))["epsilon"] == whole["epsilon"]


# ------------------------------------------------------------------------------------------------ a server that dies


@pytest.mark.parametrize(("of", "where"), [(RunDir, "append_metrics"), (Checkpoints, "save")])
@pytest.mark.parametrize("rule", ["fedavg", pytest.param("flora", marks=pytest.mark.slow)])
def test_a_deployment_whose_server_dies_spends_what_an_uninterrupted_one_does(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of: type, where: str, rule: str
) -> None:
    config = private(f"strategy.name={rule}", noise="epsilon=4")
    nodes = nodes_of(tmp_path)
    rundir = die(monkeypatch, config, nodes, 2, of, where)
    outcome = deploy(config, nodes, rundir, run_id=2)
    assert outcome.records[-1]["answered"] == [0, 1]
    assert 3.99 < claim(outcome)["epsilon"] <= 4
    for k in range(2):
        assert spent(tmp_path, k) == claim(outcome)["epsilon"]
        assert events(tmp_path / f"node-{k}.jsonl") == ["started", "released"] * ROUNDS


@pytest.mark.slow
def test_a_log_of_changes_that_was_compacted_is_the_same_question(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = private("strategy.name=flora", "rounds=5", "adapter.rank=6", "evaluation.every=5")
    nodes = nodes_of(tmp_path)
    rundir = die(monkeypatch, config, nodes, 5)
    state = rundir.checkpoints.latest()
    assert state is not None
    assert len(state.base_updates) < 4  # compacted
    deploy(config, nodes, rundir, run_id=2)
    assert events(tmp_path / "node-0.jsonl") == ["started", "released"] * 5


@pytest.mark.slow
def test_a_node_that_lost_its_answer_spends_twice_and_the_claim_says_so(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = nodes_of(tmp_path)
    rundir = die(monkeypatch, private(), nodes, 2)
    (tmp_path / "node-1.jsonl.answer").unlink()
    outcome = deploy(private(), nodes, rundir, run_id=2)
    assert claim(outcome)["epsilon"] == spent(tmp_path, 1) > spent(tmp_path, 0)
    again = RunDir.open(outcome.rundir.path, private(f"rounds={ROUNDS + 1}"))
    later = deploy(again.config, nodes, again, run_id=3)
    assert claim(later)["epsilon"] == spent(tmp_path, 1) > spent(tmp_path, 0)


# ------------------------------------------------------------------------------------------------ a ledger rolled back


@pytest.mark.parametrize("kept", [2, 5])  # of 6 lines; the last only says that what was sent has been released
def test_a_ledger_that_was_rolled_back_is_left_out_by_name(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: int
) -> None:
    config, nodes = private(), nodes_of(tmp_path)
    rundir = die(monkeypatch, config, nodes, 3)
    seen = rundir.read_json("ledgers.json")
    assert seen.keys() == {"0", "1"}
    older = tmp_path / "node-1.jsonl"
    older.write_bytes(b"".join(older.read_bytes().splitlines(keepends=True)[:kept]))
    before = older.read_bytes()
    outcome = deploy(config, nodes, rundir, run_id=2)
    assert outcome.records[-1]["answered"] == [0]
    assert "node-1.jsonl" in outcome.records[-1]["refused"]["1"]
    assert "rolled back" in outcome.records[-1]["refused"]["1"]
    assert older.read_bytes() == before
    assert events(tmp_path / "node-0.jsonl") == ["started", "released"] * ROUNDS
    assert rundir.read_json("ledgers.json")["1"] == seen["1"]  # what was seen last stays what is wanted


def test_a_node_whose_ledger_is_replaced_between_two_rounds_sends_nothing_more(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, copies = Checkpoints.save, dict[int, bytes]()
    path = tmp_path / "node-1.jsonl"

    def replaced(self: Checkpoints, state: Any) -> Any:
        copies[state.round] = path.read_bytes() if path.exists() else b""
        if state.round == 2:
            path.write_bytes(copies[1])
        return real(self, state)

    monkeypatch.setattr(Checkpoints, "save", replaced)
    outcome = deploy(private(), nodes_of(tmp_path))
    assert [record.get("answered") for record in outcome.records[1:]] == [[0, 1], [0, 1], [0]]
    assert path.read_bytes() == copies[1]


def test_a_server_that_lies_about_a_ledger_gets_a_refusal_and_nothing_else(
    private: MakeConfig, plans: list[RecordDict], tmp_path: Path
) -> None:
    config, ledger = private("rounds=2", "evaluation.every=2"), tmp_path / "mine.jsonl"
    first = sent_bytes(ask(config, ledger, plans[0]))
    heads, before = [record["hash"] for record in map(json.loads, ledger.open())], ledger.read_bytes()
    for lie in ("f" * 64, heads[0][::-1], "nonsense"):
        for plan in plans:
            with raises(PrivacyError, "ledger-rolled-back", ledger):
                ask(config, ledger, changed(plan, ledger=lie))
    assert ledger.read_bytes() == before
    for true in (START, *heads):  # an older head that it had is none the wiser, and asks for nothing new
        assert sent_bytes(ask(config, ledger, changed(plans[0], ledger=true))) == first
    assert ledger.read_bytes() == before


# ------------------------------------------------------------------------------------------------ a hostile server


@pytest.fixture
def plans(private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RecordDict]:
    """The plans of a deployment for its client 0, in order."""
    sent: list[RecordDict] = []
    real = client_app._trained

    def trained(content: RecordDict, context: Context, config: RunConfig) -> RecordDict:
        known = changed(content, ledger=START)  # they are sent to another ledger
        sent.extend([known] if context.node_config["partition-id"] == 0 else [])
        return real(content, context, config)

    monkeypatch.setattr(client_app, "_trained", trained)
    (tmp_path / "honest").mkdir()
    deploy(private("rounds=2", "evaluation.every=2"), nodes_of(tmp_path / "honest"))
    monkeypatch.undo()
    return sent


def ask(config: RunConfig, ledger: Path, plan: RecordDict) -> RecordDict:
    node = UserConfig({"partition-id": 0, "ledger": str(ledger)})
    context = Context(9, 9, node, RecordDict(), UserConfig({"toml": config.to_toml()}))
    with task_identity(9):
        return client_app._trained(plan, context, config_of(context))


def changed(plan: RecordDict, arrays: Callable[[torch.Tensor], torch.Tensor] | None = None, **head: Any) -> RecordDict:
    """A plan with other values in its head, or in its tensors."""
    told = json.loads(str(plan.config_records["plan"]["json"])) | head
    own = ArrayRecord(dict(plan.array_records["arrays"].items()))
    if arrays:
        buffer = from_array(own["adapter"])
        parts = sliced(read_layout(told["buffers"]["adapter"], len(buffer)), buffer)
        tensors = {n: arrays(from_raw(parts[n], dtype, tuple(shape))) for n, dtype, shape in told["buffers"]["adapter"]}
        own["adapter"] = to_array(joined(map(raw_bytes, tensors.values())))
        of = {n: n[-1] if n[-2:] in (":A", ":B") else "dense" for n in tensors}
        told["digests"] = {p: tensors_digest({n: t for n, t in tensors.items() if of[n] == p}) for p in told["digests"]}
    return RecordDict({"plan": ConfigRecord({"json": json.dumps(told)}), "arrays": own})


def sent_bytes(reply: RecordDict) -> bytes | None:
    if "update" not in reply:
        return None
    return b"".join(name.encode() + array.data for name, array in sorted(reply.array_records["update"].items()))


@pytest.mark.slow
def test_whatever_a_server_asks_again_each_answer_is_one_attempt_that_counts(
    private: MakeConfig, plans: list[RecordDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ledger = private("rounds=2", "evaluation.every=2"), tmp_path / "mine.jsonl"
    faster = private("rounds=2", "evaluation.every=2", "train.lr=0.5")
    first, second = plans
    tricks: list[tuple[RunConfig, RecordDict]] = [
        (config, first),
        (config, first),
        (config, changed(first, lambda tensor: tensor + 1e-3)),
        (faster, first),
        (config, changed(first, proximal_mu=0.5)),
        (config, changed(first, round=7)),
        (config, changed(first, run="f" * 32)),
        (config, first),
        (config, second),
        (config, second),
        (config, changed(second, wire="int8")),
    ]
    seen: set[bytes] = set()
    for number, (how, plan) in enumerate(tricks):
        if number % 3 == 2:  # the node is started again, with another session
            monkeypatch.setattr(ledgers, "_PROCESS", f"process {number}")
        answer = sent_bytes(ask(how, ledger, plan))
        assert answer is not None
        seen.add(answer)
        (entry,) = Ledger(ledger).entries()
        assert entry.steps == len(seen)  # one step a round
    assert len(seen) == 9
    assert sent_bytes(ask(config, ledger, tricks[-1][1])) in seen


def test_a_node_that_dies_between_training_and_sending_sends_what_it_kept_or_nothing(
    private: MakeConfig, plans: list[RecordDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ledger = private("rounds=2", "evaluation.every=2"), tmp_path / "mine.jsonl"

    def dies(self: Attempt) -> None:
        raise KeyboardInterrupt

    def restart(number: int) -> None:
        monkeypatch.setattr(ledgers, "_PROCESS", f"process {number}")

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "release", dies)
        with pytest.raises(KeyboardInterrupt):
            ask(config, ledger, plans[0])
    kept = (tmp_path / "mine.jsonl.answer").read_bytes()
    restart(1)
    answer = sent_bytes(ask(config, ledger, plans[0]))
    assert events(ledger) == ["started", "released"]
    assert sent_bytes(ask(config, ledger, plans[0])) == answer
    # An attempt that a later one made void has nothing to send, even if its answer is still there.
    ledger.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "release", dies)
        with pytest.raises(KeyboardInterrupt):
            ask(config, ledger, plans[0])
        kept = (tmp_path / "mine.jsonl.answer").read_bytes()
        restart(2)
        with pytest.raises(KeyboardInterrupt):
            ask(config, ledger, changed(plans[0], lambda tensor: tensor + 1e-3))
    (tmp_path / "mine.jsonl.answer").write_bytes(kept)
    restart(3)
    ask(config, ledger, plans[0])
    assert events(ledger) == ["started", "void", "started", "void", "started", "released"]


@pytest.mark.parametrize("damage", [*(pytest.param(d, marks=pytest.mark.slow) for d in (b"", b"no answer")), None])
def test_a_kept_answer_that_is_damaged_is_computed_again_and_counts(
    private: MakeConfig, plans: list[RecordDict], tmp_path: Path, damage: bytes | None
) -> None:
    config, ledger = private("rounds=2", "evaluation.every=2"), tmp_path / "mine.jsonl"
    kept = tmp_path / "mine.jsonl.answer"
    first = sent_bytes(ask(config, ledger, plans[0]))
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(bytes(data) if damage is None else damage)
    assert sent_bytes(ask(config, ledger, plans[0])) != first
    assert Ledger(ledger).attempts(json.loads(str(plans[0].config_records["plan"]["json"]))["run"]) == 2
