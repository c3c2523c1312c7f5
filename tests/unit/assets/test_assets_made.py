"""Assets that are made from what was downloaded: a GGUF file, conversations, digits, a pre-trained transformer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.assets import ASSETS, fetch
from fedlora.assets._made import chitchat_rows, digits_rows
from fedlora.assets.cmudict import pretrain as read_aloud
from fedlora.assets.cmudict import pronunciations
from fedlora.assets.digit_domains import CHANGES, domain_rows
from fedlora.assets.hironsan import hironsan_rows
from fedlora.assets.mitre_attack import attack_rows
from fedlora.assets.smollm2 import write_smollm2
from fedlora.assets.snli import snli_rows
from fedlora.assets.vit import pretrain

DRAW = np.random.default_rng(0)


def test_a_model_in_gguf_comes_back_with_the_nearest_bfloat16(tmp_path: Path) -> None:
    from gguf import GGUFWriter, TokenType
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(str, range(10)), "Ġ", "a", "b", "ab", "Ġab", "12"]
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, rope_theta=1e4, initializer_range=0.3,
        rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    file = GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, value in model.state_dict().items():
        part, array = name.removesuffix(".weight"), value.numpy()
        if part.startswith("model.layers."):
            _, _, layer, inner = part.split(".", 3)
            if inner.endswith(("q_proj", "k_proj")):  # llama.cpp's own order: the halves of a head interleaved
                heads = 4 if inner.endswith("q_proj") else 2
                array = array.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(array.shape)
            part = f"blk.{layer}.{names[inner]}"
        elif part == "lm_head":
            continue
        else:
            part = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[part]
        file.add_tensor(f"{part}.weight", np.ascontiguousarray(array))
    template = "{{ messages[0]['content'] }}"
    file.add_name("tiny")
    file.add_block_count(2)
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_feed_forward_length(64)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_rope_freq_base(1e4)
    file.add_rope_dimension_count(8)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(words))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(words)
    file.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(words) - 3))
    file.add_token_merges(["a b", "Ġ ab", "1 2"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template(template)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()

    folder = tmp_path / "model"
    folder.mkdir()
    write_smollm2(tmp_path / "x.gguf", folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert again.config.rms_norm_eps == 1e-5
    nearest = {name: value.to(torch.bfloat16).float() for name, value in model.state_dict().items()}
    assert again.state_dict().keys() == nearest.keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, nearest[name]), name
    model.load_state_dict(nearest)
    ids = torch.tensor([[3, 5, 14, 16, 2, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>ab ab12b<|im_end|>")["input_ids"]) == [
        "<|im_start|>", "ab", "Ġab", "1", "2", "b", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("ab ab12b")["input_ids"]) == "ab ab12b"
    assert tokenizer.chat_template == template
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", 64)


def test_an_answer_is_what_the_next_turn_says() -> None:
    def turn(person: str, *texts: str) -> list[dict[str, str]]:
        return [{"text": text, "sender": person * 9} for text in texts]

    talk = [turn("a", "Hello", "How are  you?"), turn("b", "fine\n"), turn("a", " "), turn("b", "so"), turn("a", "x")]
    long = [turn("a", "y" * 2001), turn("b", "no"), turn("a", "yes")]
    rows = list(chitchat_rows({"c" * 9: {"messages": talk}, "d" * 9: {"messages": long}}))
    common = {"conversation": "c" * 8}
    assert rows == [
        {"prompt": "Hello How are you?", "answer": "fine", "person": "b" * 8, **common},
        {"prompt": "so", "answer": "x", "person": "a" * 8, **common},
        {"prompt": "no", "answer": "yes", "person": "a" * 8, "conversation": "d" * 8},
    ]


@pytest.mark.slow
def test_pictures_for_pretraining_are_kept_from_everything_else() -> None:
    lines = [
        ",".join([*(str((number + place) % 256) for place in range(784)), str(number % 10)]) for number in range(2500)
    ]
    seen, rest = (list(digits_rows(lines, seen=flag)) for flag in (True, False))
    assert [sum(row["label"] == digit for row in seen) for digit in range(10)] == [200] * 5 + [0] * 5
    assert [sum(row["label"] == digit for row in rest) for digit in range(10)] == [50] * 5 + [250] * 5
    assert np.array(seen[0]["image"]).reshape(-1).tolist() == [place % 256 for place in range(784)]


def test_pretraining_learns_and_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.assets import vit

    monkeypatch.setattr(vit, "EPOCHS", 6)
    labels = [number % 2 for number in range(40)]
    images = DRAW.integers(0, 60, (40, 28, 28))
    images[np.array(labels) == 1, 5:15] += 150
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(files))
        assert pretrain(list(images), labels, tmp_path / name) < 0.3
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.json"} <= files[0].keys()
    assert json.loads(files[0]["recipe.json"])["pictures"] == 40


def test_only_small_assets_are_fetched_unasked() -> None:
    assert {name for name, asset in ASSETS.items() if asset.needed} == {"all-MiniLM-L6-v2", "vader"}


@pytest.mark.nightly
def test_the_chat_model_says_what_the_capital_of_france_is() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = fetch("SmolLM2-135M-Instruct")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])


@pytest.mark.nightly
def test_the_small_transformer_knows_digits_that_it_has_not_seen() -> None:
    from transformers import AutoModelForImageClassification

    from fedlora.tasks import Table
    from fedlora.tasks.image_classification import ImageClassification

    rows = [json.loads(line) for line in fetch("digits").read_text().splitlines()]
    rows = [row for row in rows if row["label"] < 5]
    assert len(rows) == 1500
    path, task = fetch("digits-vit"), ImageClassification()
    table = Table({name: [row[name] for row in rows] for name in ("image", "label")})
    examples = task.prepare(table, path, {"image": "image", "label": "label"}, keep=())
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    with torch.no_grad():
        found = task.measure(model, task.collate(examples, range(len(rows))))
    assert float((found["predicted"] == found["label"]).float().mean()) > 0.9


def test_sentences_of_the_hironsan_corpus_are_iob2_without_blank_words() -> None:
    lines = [
        "東京\tx\tB-LOC",
        "\u3000\tx\tI-LOC",
        "湾\tx\tI-LOC",
        "で\tx\tO",
        "",
        "",
        "新\tx\tI-ORG",
        "社\tx\tI-ORG",
        "丙\tx\tI-PSN",
    ]
    assert list(hironsan_rows("\n".join(lines) + "\n")) == [
        {"tokens": ["東京", "湾", "で"], "tags": ["B-LOC", "I-LOC", "O"]},
        {"tokens": ["新", "社", "丙"], "tags": ["B-ORG", "I-ORG", "B-PSN"]},
    ]


def test_sentences_of_mitre_attack_are_whole_and_have_all_their_tactics() -> None:
    techniques = [
        {"stix_id": "t1", "external_id": "T1", "tactics": ["persistence", "execution"]},
        {"stix_id": "t2", "external_id": "T2", "tactics": ["impact"]},
    ]
    actors = [{"stix_id": "m", "name": "Worm"}, {"stix_id": "g", "name": "Bears"}]

    def used(text: str | None, target: str = "t1", kind: str = "uses", revoked: bool = False) -> dict[str, object]:
        more = {"source_ref": "m", "target_ref": target, "revoked": revoked, "deprecated": False}
        return {"relationship_type": kind, "description": text, **more}

    relationships = [
        used("[Worm](https://where/S1) runs <code>a &amp;&amp; b</code>.(Citation: One 2020)(Citation: Tw..."),
        used("[Worm](https://where/S1) hides in (Citation: One 2020) and out."),  # what is before it, is no sentence
        used("Worm tells of a long..."),
        used("Worm runs `a && b`.", "t2"),
        used("Worm stays.", revoked=True),
        used("Worm is stopped.", kind="mitigates"),
        used("Worm uses Bears.", "g"),
        used(None),
    ]
    assert list(attack_rows(relationships, techniques, actors)) == [
        {
            "text": "Worm runs `a && b`.",
            "actor": "Worm",
            "tactics": ["execution", "impact", "persistence"],
            "technique": "T1",
        },
    ]


def test_pairs_of_snli_are_those_on_which_annotators_agreed() -> None:
    pairs = [
        {"gold_label": label, "captionID": "12.jpg#4", "sentence1": "A dog runs.", "sentence2": "It moves."}
        for label in ("entailment", "-")
    ]
    assert list(snli_rows(json.dumps(pair).encode() for pair in pairs)) == [
        {"premise": "A dog runs.", "hypothesis": "It moves.", "label": "entailment", "image": "12.jpg"}
    ]


def test_pronunciations_are_the_first_ones_of_words_of_some_letters() -> None:
    lines = [
        "'bout B AW1 T",
        "cat K AE1 T",
        "cat(2) K AE2 T",
        "house HH AW1 S # noun",
        "a.m. EY2 EH1 M",
        "dog's D AO1 G Z",
    ]
    assert list(pronunciations("\n".join(lines), range(3, 6))) == [
        {"word": "cat", "initial": "c", "pronunciation": "K AE1 T"},
        {"word": "house", "initial": "h", "pronunciation": "HH AW1 S"},
    ]


@pytest.mark.slow
def test_a_small_t5_learns_to_pronounce_and_is_the_same_each_time(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    words, spoken = ["cat", "house"], ["K AE1 T", "HH AW1 S"]
    losses = [read_aloud(words * 64, spoken * 64, tmp_path / name, epochs=40) for name in ("one", "other")]
    assert losses[0] == losses[1] < 0.1
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] == weights[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "one")
    written = model.generate(**tokenizer(words, padding=True, return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == spoken


def test_each_picture_of_mnist_is_in_one_domain_and_each_domain_has_as_many_of_each_digit() -> None:
    image = np.zeros((28, 28), dtype=int)
    image[10:18, 12] = 255
    digits = [{"image": (image + k % 2).clip(max=255).tolist(), "label": k % 2} for k in range(20)]
    scans = [",".join([*["0"] * 63, "16", str(k % 3)]) for k in range(30)]
    rows = list(domain_rows(digits, scans))
    assert Counter((row["domain"], row["label"]) for row in rows) == {
        (domain, label): 2 for domain in (*CHANGES, "scans") for label in (0, 1)
    }
    found = {row["domain"]: np.array(row["image"]) for row in reversed(rows) if row["label"] == 0}
    assert found["plain"].tolist() == image.tolist()
    assert found["inverted"].tolist() == (255 - image).tolist()
    assert found["rotated"].tolist() == np.rot90(image).tolist()
    assert found["scans"].tolist() == [*[[0] * 8] * 7, [0] * 7 + [255]]
    kernel = np.exp(-((np.arange(-13, 15) + 1) ** 2) / 8)  # a Gaussian of deviation 2 about column 12
    across = found["blurred"][14] / found["blurred"][14].sum()
    np.testing.assert_allclose(across, kernel / kernel.sum(), atol=0.01)
    assert abs(found["blurred"].sum() - image.sum()) < 30, "no ink is lost but for rounding"
    colours = found["coloured"]
    assert colours.shape == (28, 28, 3)
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 2
    assert abs((colours[14, 12] - colours[0, 0]) @ [0.299, 0.587, 0.114]) >= 80
    assert rows == list(domain_rows(digits, scans))
