"""Federations that train in a second: four clients, a tiny model, a tiny file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedlora.config import RunConfig, parse_config
from fedlora.privacy import dpsgd

if TYPE_CHECKING:
    from flwr.app import Message

MakeConfig = Callable[..., RunConfig]
WORDS = ("red", "green", "blue", "old", "new", "cat", "dog", "bird")


@pytest.fixture
def tiny_overrides(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> list[str]:
    return [
        f"output='{tmp_path / 'runs'}'",
        f"model.name='{tiny_bert}'",
        "model.dtype=float32",
        "adapter.rank=4",
        "adapter.targets=['query','value']",
        f"data.source='{tiny_csv}'",
        "data.domain='domain'",
        "data.group='document'",
        "data.test_fraction=0.25",
        "task.name=text-classification",
        "partition.clients=4",
        "train.steps=4",
        "train.batch_size=8",
        "train.lr=0.01",
        "runtime.threads=1",
        "runtime.kernels=off",
        "rounds=3",
    ]


@pytest.fixture
def audited_overrides(tiny_bert: Path, tiny_csv: Path) -> list[str]:
    """A private federation whose mechanism is audited, but for its unit."""
    return [
        f"model.name='{tiny_bert}'",
        f"data.source='{tiny_csv}'",
        "adapter.rank=4",
        "adapter.targets=['query','value']",
        "partition.clients=4",
        "runtime.threads=1",
        "runtime.kernels='off'",
        "runtime.device='cpu'",
        "rounds=2",
        "train.steps=2",
        "privacy.delta=1e-3",
        "privacy.noise_multiplier=2.0",
    ]


@pytest.fixture
def tiny_config(tiny_overrides: list[str]) -> MakeConfig:
    def make(*overrides: str, name: str = "tiny") -> RunConfig:
        # A table that is given whole takes the place of the keys that these federations have in it.
        whole = {f"{override.partition('=')[0].strip()}." for override in overrides}
        usual = [one for one in tiny_overrides if not any(one.startswith(table) for table in whole)]
        return parse_config("", [*usual, *overrides], name=name)

    return make


@pytest.fixture
def no_workspace() -> Iterator[None]:
    """No workspace of an earlier test is taken up, and none is left."""
    from fedlora.training.workspace import close_workspace

    close_workspace()
    yield
    close_workspace()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """All that passes between the server and nodes in this process, both ways."""
    from fedlora.flower import client_app

    seen: list[Message] = []
    real = client_app.app.__call__

    class Tapped:
        def __call__(self, message: Message, context: Any) -> Message:
            seen.append(message)
            seen.append(real(message, context))
            return seen[-1]

    monkeypatch.setattr(client_app, "app", Tapped())
    return seen


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama, and a tokeniser with a chat template for `tiny_chat`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny_llama")
    tokens = ["<pad>", "<end>", "<unk>", "you", "me", ":", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<end>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ 'you : ' if m['role'] == 'user' else 'me : ' }}{{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}me : {% endif %}"
    )
    fast.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 prompts of one word with the word three times for an answer, by three people."""
    path = tmp_path_factory.mktemp("tiny_chat") / "echo.jsonl"
    rows = [
        {"instruction": word, "output": f"{word} {word} {word}", "person": f"p{n % 3}"}
        for n, word in enumerate(WORDS * 12)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer ViT for grey pictures of 8 by 8."""
    from transformers import ViTConfig, ViTForImageClassification

    path = tmp_path_factory.mktemp("tiny_vit")
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(path)
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (path / "preprocessor_config.json").write_text(json.dumps({**facts, "image_mean": [0.5], "image_std": [0.5]}))
    return path


@pytest.fixture(scope="session")
def tiny_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pictures of noise, brighter above or below by their label."""
    path = tmp_path_factory.mktemp("tiny_pictures") / "pictures.jsonl"
    draw = np.random.default_rng(0)
    rows = []
    for number in range(96):
        picture = draw.integers(0, 128, (8, 8))
        picture[:4] += 100 * (number % 2)
        picture[4:] += 100 * (1 - number % 2)
        rows.append({"image": picture.tolist(), "label": ["below", "above"][number % 2]})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def same_secrets(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called before a run, makes "the operating system's" randomness what it was in the run before.

    Samples and noise ask for numbers of bytes of their own, and each client asks in its turn: so a client draws the
    same whether others are prepared in between or not.
    """
    drawn: Counter[int] = Counter()

    def urandom(size: int) -> bytes:
        drawn[size] += 1
        return hashlib.shake_256(f"{size} {drawn[size]}".encode()).digest(size)

    monkeypatch.setattr(dpsgd, "os", SimpleNamespace(urandom=urandom))
    return drawn.clear


@pytest.fixture
def tasks(tiny_llama: Path, tiny_chat: Path, tiny_vit: Path, tiny_pictures: Path) -> dict[str, list[str]]:
    """What each task changes in `tiny_config`."""
    return {
        "text-classification": [],
        "causal-lm": [
            "task={name='causal-lm', max_length=32}",
            f"model.name='{tiny_llama}'",
            "adapter.targets=['q_proj','v_proj']",
            f"data={{source='{tiny_chat}', test_fraction=0.2}}",
        ],
        "image-classification": [
            "task={name='image-classification'}",
            f"model.name='{tiny_vit}'",
            "adapter.targets=['q_proj','v_proj']",
            f"data={{source='{tiny_pictures}', test_fraction=0.2}}",
        ],
    }
