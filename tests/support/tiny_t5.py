"""A tiny random T5 that reads and writes words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch


def write_tiny_t5(folder: Path, texts: Iterable[str]) -> Path:
    """A folder with two layers each (hidden 32, 4 heads), and a tokenizer for the words of some texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.post_processor = end  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, initializer_factor=2.0,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
