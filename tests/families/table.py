"""Tiny random models of transformers' own classes, one table for every test that runs over families.

Each is made from its config class with two layers and weights large enough that every layer shows, and written to a
folder with a tokeniser or image processor, as a user would have it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["classifier", "pairs", "labels", "tags", "causal", "seq2seq", "image"]
"""What is learnt: a class of a text, a number of two texts, any number of classes, a tag of each word, a text, a text
for a text, or a picture's class."""
AUTO = {
    "classifier": "AutoModelForSequenceClassification",
    "pairs": "AutoModelForSequenceClassification",
    "labels": "AutoModelForSequenceClassification",
    "tags": "AutoModelForTokenClassification",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
}
SIZE = 32  # pixels of a picture's side
WORDS = [f"w{number}" for number in range(56)]
WINDOW = 6  # tokens of a sliding window or chunk: shorter than the longest examples
LONGEST = 24  # tokens of the longest example
MAX_LENGTH = 32  # of causal-lm

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
PICTURES = LAYERS | {"image_size": SIZE, "patch_size": 8}


@dataclass(frozen=True)
class Family:
    """One architecture for one task.

    Args:
        config: name of transformers' config class without "Config".
        kind: the task.
        fields: of the config, besides the common ones.
        heads: `adapter.modules_to_save`; None takes the task's.
        targets: `adapter.targets`.
        tokenizer: "encoder" puts <s> and </s> around a text, "decoder" nothing, "xlnet" <sep> and <cls> behind it with
            segments of their own, padded on the left; "bytes" splits into bytes, as GPT-2's does; "typed" is an
            encoder's with segments for the two texts of a pair, as BERT's.
        drop: common fields that the config refuses.
        exact: whether transformers' code computes in float64 all the way.
        name: what tells it from another row of the same class and task.
    """

    config: str
    kind: Kind
    fields: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] | None = None
    targets: tuple[str, ...] = ("all-linear",)
    tokenizer: Literal["encoder", "decoder", "xlnet", "bytes", "typed"] | None = None
    drop: tuple[str, ...] = ()
    exact: bool = True
    name: str = ""

    @property
    def id(self) -> str:
        """As the tests and docs/models.md name it."""
        return f"{self.name or self.config} {self.kind}"


def common(kind: Kind) -> dict[str, Any]:
    """Fields that most configs know, under these names or by their own attribute map."""
    if kind == "image":
        return PICTURES | {"num_labels": 3}
    return LAYERS | {
        "vocab_size": 4 + len(WORDS),
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


GQA = {"num_key_value_heads": 2, "head_dim": 4}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
START = {"decoder_start_token_id": 1}
ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}


def E(config: str, kind: Kind = "classifier", **more: Any) -> Family:
    """An encoder with a head."""
    return Family(config, kind, **more)


def D(config: str, kind: Kind = "causal", **more: Any) -> Family:
    """A decoder."""
    return Family(config, kind, **{"tokenizer": "decoder", **more})


def I(config: str, **more: Any) -> Family:  # noqa: E743
    """A classifier of pictures."""
    return Family(config, "image", **more)


FAMILIES: tuple[Family, ...] = (
    # ------------------------------------------------------------------------------------- encoders
    E("Bert"),
    E("Roberta"),
    E("DistilBert", fields={"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}),
    E("Albert", fields={"embedding_size": 16}),
    E("Electra", fields={"embedding_size": 16}),
    E(
        "DebertaV2",
        fields={
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    E("Deberta", fields={"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}),
    E(
        "ModernBert",
        fields={"local_attention": WINDOW, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 2},
        heads=("classifier", "head"),
    ),
    E("MPNet"),
    E("XLMRoberta"),
    E("Camembert"),
    E("BigBird", fields={"block_size": 4, "num_random_blocks": 1}),
    E("Longformer", fields={"attention_window": [WINDOW, WINDOW]}),
    E("ConvBert", fields={"embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3, "num_groups": 1}),
    E("FNet"),
    E("Nystromformer", fields={"num_landmarks": 4, "segment_means_seq_len": 4}),
    E("Yoso", fields={"use_expectation": True, "hash_code_len": 4, "num_hash": 2}),
    E(
        "MobileBert",
        fields={
            "embedding_size": 16,
            "true_hidden_size": 16,
            "intra_bottleneck_size": 16,
            "num_feedforward_networks": 1,
        },
    ),
    E(
        "Funnel",
        drop=("num_hidden_layers",),
        fields={"block_sizes": [1, 1], "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 32},
    ),
    E(
        "XLNet",
        drop=("max_position_embeddings",),
        fields={"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 32},
        tokenizer="xlnet",
        heads=("sequence_summary", "logits_proj"),
    ),
    E(
        "XLM",
        exact=False,
        fields={
            "emb_dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "n_langs": 1,
            "pad_index": 1,
            "eos_index": 2,
            "bos_index": 0,
            "unk_index": 3,
        },
        heads=("sequence_summary",),
    ),
    E("RoFormer", fields={"embedding_size": 16}),
    E("RemBert", fields={"input_embedding_size": 16, "output_embedding_size": 16}),
    E("SqueezeBert", fields={"embedding_size": 16}),
    E("Ernie"),
    E("MegatronBert"),
    E("IBert", fields={"quant_mode": False}),
    E("Esm", fields={"position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 3}),
    E("Luke", fields={"entity_vocab_size": 4, "entity_emb_size": 16}),
    E("XLMRobertaXL"),
    E("RobertaPreLayerNorm"),
    E("Data2VecText"),
    E(
        "Canine",
        fields={
            "num_hash_buckets": 64,
            "num_hash_functions": 2,
            "local_transformer_stride": 8,
            "downsampling_rate": 4,
            "upsampling_kernel_size": 4,
        },
    ),
    E(
        "Bart",
        fields={**ENCODER_DECODER, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        heads=("classification_head",),
    ),
    E(
        "T5",
        fields={"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1},
        heads=("classification_head",),
    ),
    E(
        "Reformer",
        fields={
            "attn_layers": ["local", "lsh"],
            "axial_pos_embds": False,
            "is_decoder": False,
            "attention_head_size": 4,
            "feed_forward_size": 32,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hash_seed": 0,
        },
    ),
    E("NomicBert"),
    # ------------------------------------------------------------------------------------- other heads
    E("Bert", kind="pairs", tokenizer="typed"),
    E("Roberta", kind="pairs"),
    D("Llama", "pairs", fields=GQA),
    E("DistilBert", kind="labels", fields={"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}),
    D("GPT2", "labels"),
    E("Bert", kind="tags"),
    E("Roberta", kind="tags"),
    E("DistilBert", kind="tags", fields={"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}),
    D("Llama", "tags", fields=GQA),
    D("Qwen2", "tags", tokenizer="bytes", fields={"vocab_size": 300, **GQA}),
    # ------------------------------------------------------------------------------------- encoders with decoders
    *(
        E(name, "seq2seq", fields={"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, **START})
        for name in ("T5", "MT5", "UMT5", "LongT5")
    ),
    *(
        E(name, "seq2seq", fields={**ENCODER_DECODER, **START, "forced_eos_token_id": None})
        for name in ("Bart", "MBart", "Marian", "Pegasus", "M2M100", "Blenderbot", "PLBart")
    ),
    # ------------------------------------------------------------------------------------- decoders that classify
    D("GPT2", "classifier"),
    D(
        "GPTNeo",
        "classifier",
        exact=False,
        fields={"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    D("GPTNeoX", "classifier"),
    D("Llama", "classifier", fields=GQA),
    D("Mistral", "classifier", fields={**GQA, "sliding_window": WINDOW}),
    D(
        "Qwen2",
        "classifier",
        tokenizer="bytes",
        fields={"vocab_size": 300, **GQA, "use_sliding_window": True, **SLIDING},
    ),
    D("Qwen3", "classifier", fields=GQA),
    D("Gemma", "classifier", fields=GQA),
    D("Gemma2", "classifier", fields={**GQA, **SLIDING}),
    D("Gemma3Text", "classifier", fields={**GQA, **SLIDING}),
    D("OPT", "classifier", fields={"ffn_dim": 32, "word_embed_proj_dim": 16}),
    D("Bloom", "classifier", exact=False),
    D("Mpt", "classifier", exact=False, fields={"d_model": 16, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),
    D("Falcon", "classifier"),
    D("Phi3", "classifier", fields={"num_key_value_heads": 2}),
    D("OpenAIGPT", "classifier"),
    D("CTRL", "classifier", fields={"n_embd": 16, "dff": 32, "n_layer": 2, "n_head": 4}),
    D(
        "Jamba",
        "classifier",
        targets=("in_proj", "x_proj", "out_proj", "q_proj", "v_proj"),  # its code takes dt_proj.weight past the module
        fields={
            "num_key_value_heads": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
        },
    ),
    D("Mixtral", "classifier", fields={**GQA, **MOE}),
    # ------------------------------------------------------------------------------------- causal language models
    D("GPT2"),
    D(
        "GPTNeo",
        exact=False,
        fields={"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    D("GPTNeoX"),
    D("GPTJ", exact=False, fields={"rotary_dim": 4}),
    D("Llama", fields=GQA),
    D("Mistral", fields={**GQA, "sliding_window": WINDOW}),
    D("Ministral", fields={**GQA, **SLIDING}),
    D("Mixtral", fields={**GQA, **MOE, "sliding_window": WINDOW}),
    D("Qwen2", tokenizer="bytes", fields={"vocab_size": 300, **GQA, "use_sliding_window": True, **SLIDING}),
    D(
        "Qwen2Moe",
        fields={
            **GQA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    D("Qwen3", fields=GQA),
    D("Qwen3Moe", fields={**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    D(
        "Qwen3Next",
        targets=("q_proj", "v_proj", "in_proj_qkvz"),
        fields={
            **GQA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    D("Gemma", fields=GQA),
    D("Gemma2", fields={**GQA, **SLIDING}),
    D("Gemma3Text", fields={**GQA, **SLIDING}),
    D("Phi", fields={}),
    D("Phi3", fields={"num_key_value_heads": 2, "sliding_window": WINDOW}),
    D("Cohere", fields={"num_key_value_heads": 2}),
    D("Cohere2", fields={**GQA, **SLIDING}),
    D("Starcoder2", fields={"num_key_value_heads": 2, "sliding_window": WINDOW}),
    D("GptOss", fields={**GQA, **MOE, **SLIDING}),
    D(
        "Llama4Text",
        targets=("q_proj", "v_proj"),
        fields={
            **GQA,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 32,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    D("SmolLM3", fields={"num_key_value_heads": 2}),
    D("Olmo2", fields={"num_key_value_heads": 2}),
    D("Olmo3", fields={"num_key_value_heads": 2, **SLIDING}),
    D("Granite", fields={"num_key_value_heads": 2}),
    D("OPT", fields={"ffn_dim": 32, "word_embed_proj_dim": 16}),
    D("Bloom", exact=False),
    D("Mpt", exact=False, fields={"d_model": 16, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),
    D("Falcon"),
    D("Falcon", name="Falcon with alibi", fields={"alibi": True}),
    D("BioGpt"),
    D("CTRL", fields={"n_embd": 16, "dff": 32, "n_layer": 2, "n_head": 4}),
    D("OpenAIGPT"),
    D("XGLM", fields={"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4}),
    D("CodeGen", exact=False, fields={"rotary_dim": 4}),
    D("StableLm", fields={"num_key_value_heads": 2}),
    D("Persimmon"),
    D("Nemotron", fields={"num_key_value_heads": 2}),
    D("Glm4", fields=GQA),
    D("Mamba", exact=False, targets=("in_proj", "x_proj"), fields={"state_size": 4, "use_mambapy": False}),
    D(
        "Mamba2",
        exact=False,
        targets=("in_proj",),
        fields={"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    D("Rwkv", exact=False, fields={"attention_hidden_size": 16, "context_length": 64}),
    D(
        "RecurrentGemma",
        fields={
            "num_key_value_heads": 2,
            "lru_width": 16,
            "attention_window_size": WINDOW,
            "block_types": ["recurrent", "attention"],
            "head_dim": 4,
        },
    ),
    D(
        "Jamba",
        targets=("in_proj", "x_proj", "out_proj", "q_proj", "v_proj"),
        fields={
            "num_key_value_heads": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
        },
    ),
    D(
        "Zamba2",
        fields={
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "mamba_d_state": 4,
            "n_mamba_heads": 4,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
        },
    ),
    D(
        "Lfm2",
        fields={"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    D(
        "Bart",
        fields={
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
        },
    ),
    D("Bert", name="Bert as decoder", fields={"is_decoder": True}),
    D("Bert"),
    D("Roberta"),
    D("Electra", fields={"embedding_size": 16}),
    D("BigBird", fields={"block_size": 4, "num_random_blocks": 1}),
    D("XLNet", drop=("max_position_embeddings",), fields={"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 32}),
    D(
        "XLM",
        exact=False,
        fields={
            "emb_dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "n_langs": 1,
            "pad_index": 1,
            "eos_index": 2,
            "bos_index": 0,
            "unk_index": 3,
        },
    ),
    D(
        "Reformer",
        fields={
            "attn_layers": ["local", "lsh"],
            "axial_pos_embds": False,
            "is_decoder": True,
            "attention_head_size": 4,
            "feed_forward_size": 32,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hash_seed": 0,
        },
    ),
    # ------------------------------------------------------------------------------------- pictures
    I("ViT"),
    I("DeiT"),
    I("Beit"),
    I("Data2VecVision"),
    I("Dinov2"),
    I("Dinov2WithRegisters"),
    I("ViTMSN"),
    I("Siglip", fields={"vision_config": PICTURES}),
    I("CLIP", fields={"vision_config": PICTURES}),
    I(
        "Swin",
        drop=("num_attention_heads",),
        fields={"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    ),
    I(
        "Swinv2",
        drop=("num_attention_heads",),
        fields={"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    ),
    I("ConvNext", fields={"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 4}),
    I("ConvNextV2", fields={"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 4}),
    I(
        "Segformer",
        fields={
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    I(
        "Pvt",
        fields={
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [2, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    I(
        "PoolFormer",
        fields={
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        targets=("classifier",),
        heads=(),
    ),
    I(
        "ResNet",
        fields={"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        targets=("classifier.1",),
        heads=(),
    ),
    I(
        "Levit",
        heads=(),
        fields={
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
            "patch_size": 16,
        },
    ),
    I(
        "FocalNet",
        fields={
            "embed_dim": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
            "patch_size": 4,
        },
    ),
    I(
        "Hiera",
        fields={
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "image_size": [SIZE, SIZE],
            "patch_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "masked_unit_size": [4, 4],
            "query_stride": [2, 2],
            "num_query_pool": 1,
        },
    ),
    I(
        "MobileViT",
        fields={
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8],
            "patch_size": 2,
            "num_attention_heads": 2,
        },
    ),
)


OUTPUTS = {"classifier": 3, "pairs": 1, "labels": 2, "tags": 3}
TASKS = {
    "classifier": "text-classification",
    "pairs": "text-regression",
    "labels": "multi-label-classification",
    "tags": "token-classification",
    "causal": "causal-lm",
    "seq2seq": "seq2seq-lm",
    "image": "image-classification",
}


def learnt(kind: Kind, number: int, text: Any) -> dict[str, Any]:
    """What an example has beside its text or picture."""
    if kind == "causal":
        return {}
    if kind == "seq2seq":
        return {"target": " ".join(WORDS[number : 2 * number + 1])}
    if kind == "tags":
        words = text.split()
        return {"tokens": words, "tags": [("O", "B-X", "I-X")[place % 3] for place in range(len(words))]}
    if kind == "pairs":
        return {"text_pair": " ".join(WORDS[number : 2 * number + 1]), "label": number % 3 - 0.5}
    return {"label": [["a"], ["a", "b"], []][number % 3] if kind == "labels" else "abc"[number % 3]}


def model_of(family: Family, **more: Any) -> nn.Module:
    """A random model in float64, without dropout, in evaluation mode."""
    import transformers

    config_class = getattr(transformers, f"{family.config}Config")
    fields = {**common(family.kind), **family.fields, **more}
    fields = {key: value for key, value in fields.items() if key not in family.drop}
    if family.kind in OUTPUTS:
        fields["num_labels"] = OUTPUTS[family.kind]
    config = config_class(**fields)
    if family.kind == "image":  # where transformers has several such classes it goes by this
        config.architectures = [f"{family.config}ForImageClassification"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, AUTO[family.kind]).from_config(config)
        model = model.double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "embed" not in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.25)
                elif parameter.dim() > 1:
                    nn.init.normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def tokenizer_of(family: Family) -> Any:
    """One token a word: <s>, <pad>, </s> and <unk> first, as RoBERTa has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    style = family.tokenizer or "encoder"
    if style == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *alphabet])}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
    marks = [("<s>", 0), ("</s>", 2)]
    more: dict[str, Any] = {}
    if style == "encoder":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    elif style == "typed":
        pair = "<s>:0 $A:0 </s>:0 $B:1 </s>:1"
        inner.post_processor = processors.TemplateProcessing(
            single="<s>:0 $A:0 </s>:0", pair=pair, special_tokens=marks
        )
    elif style == "xlnet":
        inner.post_processor = processors.TemplateProcessing(single="$A:0 </s>:0 <s>:2", special_tokens=marks)
        more = {"padding_side": "left", "pad_token_type_id": 3}
    if style == "typed":
        more["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    elif style != "xlnet":
        more["model_input_names"] = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        **more,
    )


def write(family: Family, folder: Path) -> Path:
    """The family's model with its tokeniser or processor, in a folder."""
    model = model_of(family)
    model.save_pretrained(folder)  # type: ignore[operator]
    if family.kind == "image":
        from transformers import ViTImageProcessor

        ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    else:
        tokenizer_of(family).save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 2 to `LONGEST` words, the first the shortest and the second the longest."""
    draw = random.Random(seed)
    lengths = [2, LONGEST - 2, *(draw.randint(3, LONGEST - 3) for _ in range(count - 2))]
    return [" ".join(draw.choices(WORDS, k=length)) for length in lengths]


def dtype_of(family: Family) -> str:
    """float64, but float32 where torch has no kernel in float64 (grouped products of experts), or transformers' own
    code does not bear it."""
    if family.config in ("Canine", "Gemma2", "XGLM", "XLNet"):
        return "float32"
    experts = {"num_experts", "num_local_experts", "num_experts_per_tok"} & set(family.fields)
    return "float32" if experts else "float64"


def toml(family: Family, folder: Path, *overrides: str) -> str:
    """The config of a run on the family's model in `folder`, with data of its own beside it."""
    data = folder / "data.jsonl"
    rows: list[dict[str, Any]]
    if family.kind == "image":
        draw = random.Random(0)
        rows = [
            {"image": [[[draw.randrange(256) for _ in range(3)] for _ in range(SIZE)] for _ in range(SIZE)]}
            for _ in range(12)
        ]
    else:
        rows = [{"text": text} for text in texts(24)]
    for number, row in enumerate(rows):
        row.update(learnt(family.kind, number, row.get("text")))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    more = f'format = "text"\nmax_length = {MAX_LENGTH}' if family.kind == "causal" else ""
    heads = f"modules_to_save = {json.dumps(list(family.heads))}" if family.heads is not None else ""
    return f"""
        [model]
        name = {json.dumps(str(folder))}
        dtype = "{dtype_of(family)}"
        dropout = 0.0
        [adapter]
        rank = 2
        targets = {json.dumps(list(family.targets))}
        {heads}
        [task]
        name = "{TASKS[family.kind]}"
        {more}
        [data]
        source = {json.dumps(str(data))}
        {'columns = {text_pair = "text_pair"}' if family.kind == "pairs" else ""}
        test_fraction = 0.25
        [partition]
        name = "iid"
        clients = 3
        [train]
        steps = 1
        batch_size = 4
        optimizer = "sgd"
        lr = 0.1
        [runtime]
        device = "cpu"
        threads = 1
        kernels = "off"
        """ + "\n".join(overrides)
