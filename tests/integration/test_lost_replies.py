"""Replies that are lost between a node and the server: asked for again, and neither trained nor spent twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from support.federations import Said
from support.on_a_grid import serve_on
from support.tiny_federations import MakeConfig

from fedlora.config import RunConfig
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower import mailbox as post
from fedlora.privacy.ledger import Ledger
from fedlora.testing.loopback_grid import LoopbackGrid

PRIVATE = (
    "server.weighting=uniform",
    "evaluation.every=2",
    "partition.clients=2",
    "train.steps=1",
    "train.batch_size=40",
    "privacy.public_examples=40",
    "privacy.delta=1e-3",
    "privacy.max_grad_norm=0.5",
    "privacy.accountant=rdp",
    "privacy.noise_multiplier=1.5",
)


class Lossy(LoopbackGrid):
    """Loses the first replies to each client's requests for training.

    Args:
        config: Of the run.
        how: "gone": the SuperLink says that it no longer has the reply; "silence": the node could not send it, and
            answers the next message.
        times: How many replies of each client are lost, one after the other.
        folder: For the nodes' ledgers.
    """

    def __init__(self, config: RunConfig, how: str, times: int, folder: Path) -> None:
        clients = int(config.partition.fields.get("clients", 4))
        nodes = [{"partition-id": k, "ledger": str(folder / f"node-{k}.jsonl")} for k in range(clients)]
        super().__init__(client_app.app, nodes, {"toml": config.to_toml()})
        self.how, self.left = how, Counter(dict.fromkeys(range(2, 2 + clients), times))
        self.silent: set[str] = set()
        self.replies: dict[int, list[bytes]] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (key,) = message_ids
        if key in self.silent:
            return []
        question = self._waiting.get(key)
        replies = list(super().pull_messages([key]))
        if question is None or question.metadata.message_type != "train":
            return replies
        node = question.metadata.dst_node_id
        (reply,) = replies
        arrays: Any = reply.content["update"]
        self.replies.setdefault(node, []).append(b"".join(array.data for array in arrays.values()))
        if not self.left[node]:
            return replies
        self.left[node] -= 1
        if self.how == "gone":
            return [Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "no longer there"), reply_to=question)]
        self.silent.add(key)
        return []


@pytest.fixture(autouse=True)
def quick_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "SOONEST_S", 0.002)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each client trained."""
    counts, answer = Counter[int](), client_app.answer

    def counted(workspace: Any, requests: Any, *rest: Any) -> Any:
        counts.update(request.client_id for request in requests)
        return answer(workspace, requests, *rest)

    monkeypatch.setattr(client_app, "answer", counted)
    return counts


def adapter(outcome: RunOutcome) -> bytes:
    return (outcome.rundir.adapter_dir / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["gone", "silence"])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.slow
def test_a_lost_reply_is_asked_for_again_and_trained_once(
    how: str, times: int, tiny_config: MakeConfig, trained: Counter[int], tmp_path: Path
) -> None:
    changes = ("rounds=2", "partition.clients=2", "server.node_timeout_s=0.02")
    whole = serve_on(Lossy(config := tiny_config(*changes, name="whole"), how, 0, tmp_path), config)
    trained.clear()
    grid, told = Lossy(config := tiny_config(*changes, name="lossy"), how, times, tmp_path), Said()
    outcome = serve_on(grid, config, told)
    assert adapter(outcome) == adapter(whole)
    assert [record["answered"] for record in outcome.records[1:]] == [[0, 1]] * 2
    assert trained == {0: 2, 1: 2}
    assert [len(sent) for sent in grid.replies.values()] == [2 + times] * 2
    assert sum("is asked again" in line for line in told.lines) == 2 * times


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "silence"])
def test_a_private_client_sends_the_same_noisy_answer_again_and_spends_once(
    how: str, tiny_config: MakeConfig, trained: Counter[int], tmp_path: Path
) -> None:
    outcomes, grids = {}, {}
    for name, times in (("whole", 0), ("lossy", 2)):
        (tmp_path / name).mkdir()
        config = tiny_config(*PRIVATE, "rounds=2", "server.node_timeout_s=0.02", name=name)
        grids[name] = Lossy(config, how, times, tmp_path / name)
        outcomes[name] = serve_on(grids[name], config)
        assert trained == {0: 2, 1: 2}
        trained.clear()
    for node, sent in grids["lossy"].replies.items():
        assert sent[0] == sent[1] == sent[2] != sent[3], node  # two lost and one heard; the second round's is another
    for k in range(2):
        one, other = (Ledger(tmp_path / name / f"node-{k}.jsonl") for name in ("whole", "lossy"))
        assert one.epsilon(1e-3, "rdp") == other.epsilon(1e-3, "rdp") > 0
        lines = [json.loads(line)["event"] for line in other.path.read_text().splitlines()]
        assert lines == ["started", "released"] * 2
    claims = [outcomes[name].rundir.read_json("result.json")["privacy"] for name in ("whole", "lossy")]
    assert claims[0]["epsilon"] == claims[1]["epsilon"]
