"""Laws of the task "causal-lm", on tiny random models and a tokeniser made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.config import OpenTable
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.tasks import Examples, Table, _token_loss, load_task
from fedlora.tasks._base import NEW_TOKENS
from fedlora.tasks._chat import PLAIN_TEMPLATE, _cut, encode_rows, pieces
from fedlora.tasks._chat_formats import Conversation
from fedlora.tasks._text import load_tokenizer
from fedlora.tasks._token_loss import IGNORED
from fedlora.tasks.causal_lm import CausalLM

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As templates that drop the reasoning of earlier turns: the beginning changes once the conversation goes on.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if loop.last %}thought {% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
)
PAIRS = {
    "instruction": ["hello", "who sees the cat ?", "what likes the old red bird , the dog ?", "hello , hello"],
    "output": ["the dog", "yes", "a blue cat hears the old bird .", "no , the new dog sees a bird"],
}


def tokenizer_folder(folder: Path, template: str | None) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", "<|start|>", "<|pad|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("chat"), CHATML)


def tiny_llama(**changes: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | changes)).eval().requires_grad_(False)


def prepared(task: CausalLM, folder: Path, columns: dict[str, list[Any]]) -> Examples:
    roles = {role: role for role in task.roles_of(columns, {})}
    return task.prepare(Table(columns), folder, roles, keep=())


def losses(task: CausalLM, model: torch.nn.Module, examples: Examples, indices: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return task.losses(model, task.collate(examples, indices))


# ------------------------------------------------------------------------------------------------ what counts


def test_the_rendered_template_comes_back_and_only_the_answer_counts(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    examples = prepared(CausalLM(max_length=256), folder, PAIRS)
    for row, (prompt, answer) in enumerate(zip(*PAIRS.values(), strict=True)):
        ids, labels = examples.inputs["input_ids"][row], examples.inputs["labels"][row]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids) == whole.rstrip("\n")
        assert tokenizer.decode(ids[labels != IGNORED]) == f"{answer}<|end|>"
        assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()


def test_train_on_all_counts_everything_but_the_first_token(folder: Path) -> None:
    examples = prepared(CausalLM(train_on="all"), folder, PAIRS)
    for labels in examples.inputs["labels"]:
        assert labels[0] == IGNORED
        assert (labels[1:] != IGNORED).all()


def test_answers_counts_each_of_the_assistants_turns_and_answer_the_last(folder: Path) -> None:
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "who ?"},
        {"role": "assistant", "content": "the cat"},
    ]
    tokenizer = load_tokenizer(str(folder))
    counted = {}
    for train_on in ("answer", "answers"):
        examples = prepared(CausalLM(train_on=train_on), folder, {"messages": [talk]})
        ids, labels = examples.inputs["input_ids"][0], examples.inputs["labels"][0]
        counted[train_on] = tokenizer.decode(ids[labels != IGNORED])
    assert counted == {"answer": "the cat<|end|>", "answers": "yes<|end|>the cat<|end|>"}


def test_a_system_message_is_put_before_conversations_that_have_none(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    own = [{"role": "system", "content": "new"}, {"role": "assistant", "content": "yes"}]
    none = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    examples = prepared(CausalLM(system="old"), folder, {"messages": [own, none]})
    texts = [tokenizer.decode(ids) for ids in examples.inputs["input_ids"]]
    assert texts[0].startswith("<|start|>system\nnew<|end|>\n<|start|>assistant")
    assert texts[1].startswith("<|start|>system\nold<|end|>\n<|start|>user")


def test_plain_text_is_closed_by_the_end_token_and_counts_whole(folder: Path) -> None:
    examples = prepared(CausalLM(max_length=12), folder, {"text": ["a cat", "the old blue bird sees"]})
    tokenizer = load_tokenizer(str(folder))
    assert [tokenizer.decode(ids) for ids in examples.inputs["input_ids"]] == ["a cat<|end|>", "the old blue"]
    assert [int((labels == IGNORED).sum()) for labels in examples.inputs["labels"]] == [1, 1]


def test_without_a_chat_template_a_plain_one_is_used(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, None)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template is None
    examples = prepared(CausalLM(), folder, {"instruction": ["hello"], "output": ["yes"]})
    ids, labels = examples.inputs["input_ids"][0], examples.inputs["labels"][0]
    assert tokenizer.decode(ids) == "<|start|>User: hello\nAssistant: yes<|end|>"
    assert tokenizer.decode(ids[labels != IGNORED]) == " yes<|end|>"
    assert "assistant" in PLAIN_TEMPLATE


def test_a_template_that_rewrites_its_beginning_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, FORGETFUL)
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    with raises(ModelError, "template-rewrites-beginning", "chat_template"):
        pieces(load_tokenizer(str(folder)), Conversation(talk, 1), "answer")


@pytest.mark.parametrize("prompt", [1, 5, 40])
@pytest.mark.parametrize("answer", [1, 5, 40])
@pytest.mark.parametrize("limit", [8, 20, 100])
def test_cutting_keeps_the_end_of_the_prompt_and_the_start_of_the_answer(prompt: int, answer: int, limit: int) -> None:
    ids, counts = np.arange(prompt + answer), np.arange(prompt + answer) >= prompt
    short, flags, cut = _cut(ids, counts, prompt, limit)
    assert len(short) == min(limit, prompt + answer)
    assert cut == (limit < prompt + answer)
    assert (np.diff(short) == 1).all()
    assert {prompt - 1, prompt} <= set(short.tolist())
    assert (flags == (short >= prompt)).all()
    assert (~flags).sum() >= min(prompt, limit // 2)


# ------------------------------------------------------------------------------------------------ one string

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "the rosé 🌹"},
    {"role": "user", "content": "where"},
    {"role": "assistant", "content": "in paris"},
]


def sentencepiece_like(kind: str) -> Any:
    """A tokeniser that puts a blank before whatever it is given first, as Llama-2's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list("[INST]/▁"),
        show_progress=False,
    )
    # "]the" and "]in" become tokens that lie across the border of prompt and answer.
    inner.train_from_iterator(["[INST] who [/INST]the rose", "[INST] where [/INST]in paris"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


@pytest.mark.parametrize("train_on", ["answer", "answers", "all"])
@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
def test_a_conversation_is_tokenised_as_one_string(kind: str, train_on: Any, tmp_path: Path) -> None:
    """The ids are those of transformers, and an answer's tokens are those that hold some of its characters."""
    tokenizer = sentencepiece_like(kind)
    tokenizer.save_pretrained(tmp_path)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    wanted = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    examples = prepared(CausalLM(train_on=train_on), tmp_path, {"messages": [TALK]})
    ids, labels = examples.inputs["input_ids"][0].tolist(), examples.inputs["labels"][0]
    assert ids == wanted["input_ids"]
    assert ids == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    taught = {"answer": TALK[3:], "answers": [TALK[1], TALK[3]], "all": TALK}[train_on]
    spans = [(rendered.index(m["content"]), len(m["content"]) + len("</s>")) for m in taught]
    for place, (begin, end) in enumerate(wanted["offset_mapping"]):
        inside = any(begin < first + size and end > first for first, size in spans)
        if begin < end and place:
            assert (labels[place] != IGNORED) == (inside or train_on == "all"), place


class Letters:
    """A tokeniser in Python, without offsets: one token a character, or two where they are in `pairs`."""

    is_fast, chat_template, all_special_tokens, eos_token_id = False, INST, ("</s>",), None

    def __init__(self, *pairs: str) -> None:
        self.pairs = pairs

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return "".join(f"[{m['content']}]" if m["role"] == "user" else m["content"] + "</s>" for m in messages)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        out = []
        for text in texts:
            ids, place = [], 0
            while place < len(text):
                size = 2 if text[place : place + 2] in self.pairs else 1
                ids.append(sum(map(ord, text[place : place + size])))
                place += size
            out.append(ids)
        return {"input_ids": out}


def test_a_tokeniser_without_offsets_is_asked_for_the_beginnings() -> None:
    tokenizer = Letters("pa")
    ((ids, counts, _),) = encode_rows(tokenizer, [Conversation(TALK, 3)], "answers", 100)
    assert ids.tolist() == tokenizer([tokenizer.apply_chat_template(TALK)])["input_ids"][0]
    assert "".join(map(chr, ids[counts])) == "the rosé 🌹</s>in \xd1ris</s>"  # "pa" is one token
    with raises(ModelError, "token-across-border", "tokenizer.json"):
        list(encode_rows(Letters("]i"), [Conversation(TALK, 3)], "answers", 100))


# ------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_the_mean_over_the_answers_own_tokens(folder: Path) -> None:
    task, model = CausalLM(), tiny_llama()
    examples = prepared(task, folder, PAIRS)
    found = losses(task, model, examples, [2, 0, 3, 1])
    for loss, row in zip(found, [2, 0, 3, 1], strict=True):
        ids = torch.tensor(examples.inputs["input_ids"][row].astype(np.int64))
        with torch.no_grad():
            predictions = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        answer = np.flatnonzero(examples.inputs["labels"][row] != IGNORED)
        expected = -np.mean([float(predictions[place - 1, ids[place]]) for place in answer])
        assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_neither_batch_mates_nor_padding_nor_order_change_an_examples_loss(folder: Path) -> None:
    task, model = CausalLM(), tiny_llama()
    examples = prepared(task, folder, PAIRS)
    alone = torch.cat([losses(task, model, examples, [row]) for row in range(4)])
    together = losses(task, model, examples, [3, 1, 0, 2])
    torch.testing.assert_close(together, alone[[3, 1, 0, 2]], atol=1e-5, rtol=0)
    assert alone.unique().numel() == 4


def test_what_fills_the_padding_does_not_matter(folder: Path) -> None:
    task, model = CausalLM(), tiny_llama()
    examples = prepared(task, folder, PAIRS)
    batch = task.collate(examples, [0, 2])
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], 77))
    assert (other["input_ids"] != batch["input_ids"]).any()
    with torch.no_grad():
        torch.testing.assert_close(task.losses(model, other), task.losses(model, batch), atol=1e-6, rtol=0)


def test_models_that_change_their_logits_after_the_head_give_their_own_loss(folder: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, final_logit_softcapping=0.5, pad_token_id=2,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    task = CausalLM()
    examples = prepared(task, folder, PAIRS)
    batch = task.collate(examples, [1])
    with torch.no_grad():
        whole = model(**batch).loss
    torch.testing.assert_close(losses(task, model, examples, [1])[0], whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packing", [False, True])
def test_a_frozen_head_sees_what_counts_and_a_trained_one_whole_rows(folder: Path, packing: bool) -> None:
    task, model = CausalLM(packing=packing), tiny_llama()
    examples = prepared(task, folder, PAIRS)
    batch = task.collate(examples, range(4))
    losses(task, model, examples, [0])  # whatever is tried out once is behind us
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[:2]))
    with torch.no_grad():
        frozen = task.losses(model, batch)
        model.lm_head.requires_grad_(True)
        trained = task.losses(model, batch)
    assert seen == [(1, int((batch["labels"] != IGNORED).sum())), batch["labels"].shape]
    torch.testing.assert_close(frozen, trained, atol=1e-5, rtol=0)


def test_perplexity_weighs_tokens_and_the_loss_weighs_examples() -> None:
    measures = {"loss": np.array([1.0, 4.0]), "tokens": np.array([9.0, 1.0]), "exact": np.array([0.0, 1.0])}
    found = CausalLM().summarise(measures)
    assert found["exact_match"] == 0.5
    assert found["loss"] == pytest.approx(2.5)
    assert found["token_loss"] == pytest.approx(1.3)
    assert found["perplexity"] == pytest.approx(np.exp(1.3))
    assert not CausalLM.higher_is_better
    diverged = {"loss": np.array([1e4]), "tokens": np.array([1.0]), "exact": np.array([0.0])}
    assert CausalLM().summarise(diverged)["perplexity"] == np.inf


def test_measure_counts_tokens_and_agrees_with_the_loss(folder: Path) -> None:
    task, model = CausalLM(), tiny_llama()
    examples = prepared(task, folder, PAIRS)
    with torch.no_grad():
        found = task.measure(model, task.collate(examples, [0, 2]))
    counted = [int((examples.inputs["labels"][row] != IGNORED).sum()) for row in (0, 2)]
    assert found["tokens"].tolist() == counted
    torch.testing.assert_close(found["loss"], losses(task, model, examples, [0, 2]))


@pytest.mark.parametrize("chunk", [512, 2])
def test_an_answer_is_exact_if_greedy_decoding_gives_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(_token_loss, "CHUNK", chunk)
    task, model = CausalLM(), tiny_llama()
    batch = task.collate(prepared(task, folder, PAIRS), [0, 2])
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        assert not task.measure(model, batch)["exact"].any()
        for row, place in (
            (labels != IGNORED).nonzero().tolist()
        ):  # in order, so that each token follows from those before
            ids[row, place] = labels[row, place] = model(input_ids=ids[row : row + 1, :place]).logits[0, -1].argmax()
        assert task.measure(model, batch)["exact"].all()
        last = int((labels[0] != IGNORED).nonzero()[-1])
        ids[0, last] = labels[0, last] = (labels[0, last] + 1) % model.config.vocab_size
        assert task.measure(model, batch)["exact"].tolist() == [False, True]


# ------------------------------------------------------------------------------------------------ packing


def packed_and_padded(folder: Path, length: int = 128) -> tuple[CausalLM, CausalLM, Examples]:
    padded, packing = CausalLM(max_length=length), CausalLM(max_length=length, packing=True)
    columns = {name: values * 3 for name, values in PAIRS.items()}
    return padded, packing, prepared(padded, folder, columns)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packing_changes_no_loss_and_no_gradient(folder: Path, implementation: str) -> None:
    padded, packing, examples = packed_and_padded(folder)
    model = tiny_llama(attn_implementation=implementation)
    model.model.requires_grad_(True)
    indices = [5, 0, 1, 7, 2, 3, 10]
    found, grads = {}, {}
    for task in (padded, packing):
        model.zero_grad()
        each = task.losses(model, task.collate(examples, indices))
        (each * torch.arange(1.0, 8.0)).sum().backward()
        found[task.packing] = each.detach()
        grads[task.packing] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[True], found[False], atol=1e-5, rtol=0)
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-6, rtol=0)


def test_a_pack_holds_each_token_once_within_the_length(folder: Path) -> None:
    _, packing, examples = packed_and_padded(folder)
    indices = [5, 0, 1, 7, 2, 3, 10]
    batch = packing.collate(examples, indices)
    assert batch["input_ids"].shape[0] < len(indices)
    assert batch["input_ids"].shape[1] <= packing.max_length
    for number, index in enumerate(indices):
        mine = batch["segments"] == number
        ids = examples.inputs["input_ids"][index]
        assert batch["input_ids"][mine].tolist() == ids.tolist()
        assert batch["position_ids"][mine].tolist() == list(range(len(ids)))
        assert mine.any(1).sum() == 1
    assert (batch["labels"][batch["segments"] == -1] == IGNORED).all()


def test_packing_says_that_rows_are_no_examples() -> None:
    assert CausalLM().rows_are_examples
    assert not CausalLM(packing=True).rows_are_examples


def test_packing_works_with_learnt_positions_too(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    padded, packing, examples = packed_and_padded(folder)
    indices = list(range(6))
    torch.testing.assert_close(
        losses(packing, model, examples, indices), losses(padded, model, examples, indices), atol=1e-5, rtol=0
    )


class Leaky(torch.nn.Module):
    """Remembers across examples, as a recurrent model does, and ignores masks and positions."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.embed, self.head, self.strength = torch.nn.Embedding(259, 16), torch.nn.Linear(16, 259), strength

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        from types import SimpleNamespace

        embedded = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(embedded + self.strength * embedded.cumsum(1)))


def test_packing_is_refused_where_examples_would_see_each_other(folder: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    _, packing, examples = packed_and_padded(folder)
    mamba = MambaConfig(vocab_size=259, hidden_size=16, state_size=4, num_hidden_layers=1)
    bloom = BloomConfig(vocab_size=259, hidden_size=16, n_layer=1, n_head=2)
    for model, code in (
        (Leaky(1.0), "packing-leaks"),
        (Leaky(5e-5), "packing-leaks"),
        (MambaForCausalLM(mamba), "packing-leaks"),
        (BloomForCausalLM(bloom), "packing-leaks"),
    ):
        model.train()
        with raises(ModelError, code, "task.packing = false"):
            packing.check(model, [examples])
        assert all(module.training for module in model.modules())


# ------------------------------------------------------------------------------------------------ samples


def test_samples_are_greedy_and_the_same_each_time(folder: Path) -> None:
    task, model = CausalLM(), tiny_llama()
    examples = prepared(task, folder, PAIRS)
    first = task.samples(model, examples, [2, 0], folder)
    torch.manual_seed(1)
    assert first == task.samples(model.train(), examples, [2, 0], folder)
    assert model.training
    assert [sample.reference for sample in first] == [PAIRS["output"][2], PAIRS["output"][0]]
    assert all(sample.prompt.endswith("<|start|>assistant\n") for sample in first)
    ids = load_tokenizer(str(folder))(first[1].prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model.eval()
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 0:
            break
    text = load_tokenizer(str(folder)).decode(ids[0], skip_special_tokens=True)
    assert text.endswith(first[1].generated)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("columns", "place"),
    [
        ({"instruction": ["hello", None], "output": ["yes", "no"]}, "row 1, column 'instruction'"),
        ({"prompt": ["hello", "who"], "completion": ["yes", "  "]}, "row 1, column 'completion'"),
    ],
)
def test_missing_values_are_named(folder: Path, columns: dict[str, list[Any]], place: str) -> None:
    with raises(DataError, "not-a-text", place):
        prepared(CausalLM(), folder, columns)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("hello", "not-a-conversation"),
        ([], "not-a-conversation"),
        ([{"role": "user", "content": "hello"}], "no-final-answer"),
        ([{"role": "assistant", "content": " "}], "no-final-answer"),
        ([{"role": "assistant", "text": "yes"}], "malformed-message"),
    ],
)
def test_messages_that_are_none_are_refused(folder: Path, value: Any, code: str) -> None:
    with raises(DataError, code, "row 0, column 'messages'"):
        prepared(CausalLM(), folder, {"messages": [value]})


def test_the_table_of_a_config_is_checked() -> None:
    task = load_task(OpenTable(name="causal-lm", format="text"))  # type: ignore[call-arg]
    assert task.roles == ("text",)
    with raises(ConfigError, "unknown-key", "'pakcing'", "'packing'"):
        load_task(OpenTable(name="causal-lm", pakcing=True))  # type: ignore[call-arg]
    with raises(ConfigError, "bad-value", "format", "'chat'"):
        load_task(OpenTable(name="causal-lm", format="chat"))  # type: ignore[call-arg]


def test_a_config_names_the_columns_of_a_file(folder: Path, tmp_path: Path) -> None:
    from fedlora.config import parse_config
    from fedlora.data import load_data

    rows = [f'{{"question": "who {n}", "reply": "cat {n}", "person": "p{n % 3}"}}' for n in range(30)]
    (tmp_path / "talk.jsonl").write_text("\n".join(rows), encoding="utf-8")
    text = f"""
        model.name = '{folder}'
        task = {{ name = 'causal-lm' }}
        partition = {{ name = 'natural', column = 'person' }}
        [data]
        source = '{tmp_path / "talk.jsonl"}'
        columns = {{ instruction = 'question', output = 'reply' }}
    """
    data = load_data(parse_config(text))
    assert len(data.clients) == 3
    tokenizer = load_tokenizer(str(folder))
    for number, client in enumerate(data.clients):
        assert set(data.train.columns["person"][client]) == {f"p{number}"}
    ids = data.test.inputs["input_ids"][0]
    assert tokenizer.decode(ids).startswith("<|start|>user\nwho ")
    with raises(DataError, "no-such-column", "'output'"):
        load_data(parse_config(text.replace(", output = 'reply'", "")))
    with raises(DataError, "format-unknown", "person, question, reply", "data.columns"):
        load_data(parse_config(text.replace("columns", "# columns")))
    with raises(ConfigError, "unknown-role", "'ouptut'", "'output'"):
        load_data(parse_config(text.replace("output =", "ouptut =")))


def test_gradients_by_example_are_each_examples_own(folder: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from fedlora.privacy.hooks import attach, backward, detach, per_sample_gradients

    task, model = CausalLM(), tiny_llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    examples = prepared(task, folder, PAIRS)
    hooks = attach(model)
    try:
        backward(task.losses(model, task.collate(examples, range(4))))
        found = per_sample_gradients(params, 4)
    finally:
        detach(model, hooks)
    for row in range(4):
        own = torch.autograd.grad(task.losses(model, task.collate(examples, [row])).sum(), list(params.values()))
        for name, gradient in zip(params, own, strict=True):
            torch.testing.assert_close(found[name][row], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)
