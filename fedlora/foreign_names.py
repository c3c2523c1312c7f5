"""What other libraries call a key, and what it is here: transformers, TRL, PEFT, Axolotl, unsloth, Flower, FedML.

A config that was written for one of them is answered key by key, each in one line.
"""

from __future__ import annotations

_SAME = {
    "name": "run_name",
    "output": "output_dir",
    "rounds": "num_rounds num_server_rounds num-server-rounds comm_round",
    "model.name": "base_model model_name model_name_or_path pretrained_model_name_or_path base_model_name_or_path",
    "model.dropout": "hidden_dropout_prob attention_dropout attention_probs_dropout_prob",
    "adapter.method": "peft_type adapter_type",
    "adapter.rank": "r lora_r lora_rank peft_lora_r",
    "adapter.alpha": "lora_alpha peft_lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target_modules",
    "adapter.layers": "layers_to_transform",
    "adapter.start": "from adapter_name_or_path lora_model_dir adapter_path lora_path resume_adapter_file",
    "task.max_length": "max_seq_length seq_length sequence_len cutoff_len model_max_length",
    "task.packing": "sample_packing",
    "task.label_smoothing": "label_smoothing_factor",
    "data.source": "dataset dataset_name dataset_path data_path",
    "data.text": "dataset_text_field text_column",
    "data.label": "label_column",
    "data.limit": "max_train_samples",
    "partition.clients": "num_clients num_supernodes client_num_in_total",
    "train.lr": "learning_rate learning_rate_max lr_init",
    "train.lr_end": "learning_rate_min min_lr",
    "train.batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_batch_size local_bs",
    "train.epochs": "num_train_epochs num_epochs local_epochs local_ep",
    "train.steps": "max_steps local_steps",
    "train.clip_norm": "max_grad_norm gradient_clip_val",
    "train.optimizer": "optim",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "train.proximal_mu": "proximal-mu mu fedprox_mu prox_mu",
    "train.momentum": "sgd_momentum",
    "train.neftune_noise_alpha": "neftune_noise_alpha neftune_alpha noise_alpha",
    "server.fraction": "fraction_fit fraction-fit fraction_train fraction-train",
    "server.clients_per_round": "client_num_per_round",
    "evaluation.every": "eval_steps eval_strategy evaluation_strategy evaluate_every",
    "tracking.name": "report_to",
    "runtime.device_map": "device_map",
}
_WHOLE = (
    "no weight is cut into pieces here: runtime.device_map = 'auto' spreads a base's layers over all GPUs; "
    "model.quantize = 'nf4' and train.gradient_checkpointing = true make it need less memory"
)
_ALWAYS = "rows of like length are always computed together, whatever is sampled: remove it"
_WORDS = {
    **dict.fromkeys(("max_memory", "fsdp", "fsdp_config", "deepspeed", "tp_plan", "tp_size"), _WHOLE),
    "group_by_length": _ALWAYS,
    "padding_free": f"{_ALWAYS}, or set task.packing = true for causal-lm",
    "fedprox": "FedProx is train.proximal_mu, with any rule",
    "ditto": "Ditto is train.personal, with any rule",
    "bf16": "set model.dtype = 'bfloat16', or 'auto' for it wherever it is fast",
    "fp16": "set model.dtype = 'float16', or 'auto' for bfloat16 wherever it is fast",
    "torch_dtype": "it is model.dtype here",
    "target_parameters": "adapters sit on linear layers, and experts that are stacked in one tensor stay as they are: "
    "remove it",
    "use_rslora": "set adapter.method = 'rslora'",
    "use_dora": "set adapter.method = 'dora'",
    "init_lora_weights": "set adapter.method = 'pissa' or 'olora' for another start than LoRA's",
    "bias": "biases stay frozen: remove it",
    "gradient_accumulation_steps": "train.batch_size is what one optimiser step sees, and train.micro_batch_size how "
    "much of it is computed at once",
    "per_device_eval_batch_size": "evaluation makes its own batches, by their tokens: remove it",
    "warmup_ratio": "set train.warmup_rounds, of the whole run, or train.warmup_steps, of each round",
    "adam_beta1": "AdamW's betas are torch's, 0.9 and 0.999: remove it",
    "adam_beta2": "AdamW's betas are torch's, 0.9 and 0.999: remove it",
    "adam_epsilon": "AdamW's epsilon is torch's, 1e-8: remove it",
    "completion_only_loss": "set task.train_on = 'answer', or 'all'",
    "assistant_only_loss": "set task.train_on = 'answers', or 'all'",
    "logging_steps": "every round is logged: remove it",
    "save_steps": "every round is saved: remove it",
    "save_strategy": "every round is saved: remove it",
    "dataloader_num_workers": "examples are tokenised once, before the first round: remove it",
    "use_cpu": "set runtime.device = 'cpu'",
    "no_cuda": "set runtime.device = 'cpu'",
    "resume_from_checkpoint": "resume with: fedlora run --resume runs/NAME",
    "resume_from": "begin with an adapter by adapter.start, and resume a run with: fedlora run --resume runs/NAME",
}
_TABLE = {name: f"it is {key} here" for key, names in _SAME.items() for name in names.split()} | _WORDS


def our_word(key: str) -> str | None:
    """What to do here instead of another library's key, as the end of a message; None for a key of nobody's.

    Example:
        >>> our_word("learning_rate")
        'it is train.lr here'
    """
    return _TABLE.get(key)
