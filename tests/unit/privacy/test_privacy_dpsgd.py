"""The private step against a loop over single examples in float64, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.errors import PrivacyError
from fedlora.privacy.dpsgd import PrivateStep, poisson_batches, secret_generator, secret_rng

C = 0.05


def peft_model(
    kind: str, freeze_a: bool = False, train_head: bool = True
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny model with moved LoRA factors in float64, in training mode without dropout, and six examples."""
    import peft
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ids = torch.randint(3, 40, (6, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[4, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=40, num_labels=3, **small, **none)
        base, targets, head = transformers.BertForSequenceClassification(config), ["query", "value"], ["classifier"]
    elif kind == "vit":
        config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **small, **none)
        base = transformers.ViTForImageClassification(config)
        targets = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
        targets, head = [name for name in targets if name != "classifier"], ["classifier"]
        batch = {"pixel_values": torch.randn(6, 3, 8, 8, dtype=torch.float64), "labels": batch["labels"]}
    else:
        tied = kind == "qwen-tied"
        name = "Qwen2" if tied else "Llama"
        config = getattr(transformers, f"{name}Config")(
            vocab_size=40, tie_word_embeddings=tied, num_key_value_heads=2, **small
        )
        base, targets, head = getattr(transformers, f"{name}ForCausalLM")(config), ["q_proj", "down_proj"], []
        batch["labels"] = torch.where(mask == 1, ids, -100)
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, modules_to_save=head or None)
    model = peft.get_peft_model(base, lora).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for name, parameter in model.named_parameters():
        if (freeze_a and "lora_A" in name) or (not train_head and "modules_to_save" in name):
            parameter.requires_grad_(False)
    return model, batch


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each example's own loss: cross entropy, for language models the mean over its own tokens."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    flat = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return flat.sum(1) / (labels[:, 1:] >= 0).sum(1)


def taker(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[np.ndarray], torch.Tensor]:
    return lambda part: losses(model, {name: value[torch.from_numpy(part)] for name, value in batch.items()})


def moved(
    kind: str, indices: np.ndarray, clip: float, physical: int | None, how: dict[str, bool]
) -> dict[str, torch.Tensor]:
    """What one private step of plain SGD with learning rate 1 changes."""
    model, batch = peft_model(kind, **how)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    settings = {"noise_multiplier": 1e-3, "expected_batch_size": 2.5, "physical_batch_size": physical}
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    with PrivateStep(model, optimizer, max_grad_norm=clip, generator=generator, **settings) as private:
        private.step(indices, taker(model, batch))
    return {name: p.detach() - before[name] for name, p in trained.items()}


@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("bert", {}),
        ("bert", {"freeze_a": True}),
        ("bert", {"train_head": False}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("qwen-tied", {"freeze_a": True}, marks=pytest.mark.slow),
        pytest.param("vit", {}, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_brute_force_sum_of_clipped_gradients(
    kind: str, how: dict[str, bool], physical: int | None
) -> None:
    indices = np.array([0, 1, 3, 4, 5])
    model, batch = peft_model(kind, **how)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone = [torch.autograd.grad(taker(model, batch)(np.array([i])).sum(), list(trained.values())) for i in indices]
    norms = [float(torch.cat([g.flatten() for g in gradients]).norm()) for gradients in alone]
    clip = float(np.median(norms))  # some are clipped and some are not
    step = moved(kind, indices, clip, physical, how)
    noise = moved(kind, indices[:0], clip, physical, how)  # the same generator, an empty sample
    for k, name in enumerate(trained):
        total = sum(g[k] * min(1.0, clip / (norm + 1e-6)) for g, norm in zip(alone, norms, strict=True))
        assert torch.allclose(step[name] - noise[name], -total / 2.5, rtol=0, atol=1e-12), name


def test_an_empty_sample_takes_a_step_of_noise_with_the_stated_deviation() -> None:
    model = torch.nn.Linear(400, 400)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    with PrivateStep(model, optimizer, max_grad_norm=2.0, noise_multiplier=1.5, expected_batch_size=4.0) as private:
        private.step(np.empty(0, dtype=np.int64), lambda part: model(torch.ones(len(part), 400)).sum(1))
    noise = model.weight.detach() - before
    assert float(noise.std()) == pytest.approx(2.0 * 1.5 / 4.0, rel=0.01)
    assert abs(float(noise.mean())) < 0.75 / 400 * 5


def test_one_example_moves_the_sum_by_at_most_c_whatever_its_gradient() -> None:
    """The sensitivity itself: with and without one example of norm 10^4, an infinite and an undefined one."""
    for size in (0.3, 1e4, float("inf"), float("nan")):
        sums = []
        for sample in ([0], [0, 1]):
            model = torch.nn.Linear(3, 1, bias=False).double()
            torch.nn.init.zeros_(model.weight)
            x = torch.tensor([[0.1, 0.2, 0.0], [0.0, size, 0.0]], dtype=torch.float64)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            generator = torch.Generator().manual_seed(1)
            settings = {
                "max_grad_norm": 1.0,
                "noise_multiplier": 1.0,
                "expected_batch_size": 1.0,
                "generator": generator,
            }
            with PrivateStep(model, optimizer, **settings) as private:
                private.step(np.array(sample), lambda part, model=model, x=x: model(x[part]).squeeze(1))
            sums.append(model.weight.detach())
        moved = float((sums[1] - sums[0]).norm())
        assert moved == pytest.approx(min(size, 1.0) if np.isfinite(size) else 0.0, abs=1e-5)
        assert moved <= 1.0


def test_hooks_come_off_and_keys_stay() -> None:
    model, batch = peft_model("bert")
    keys = list(model.state_dict())
    plain = dict(vars(next(p for p in model.parameters() if p.requires_grad)))
    for _ in range(2):  # a second one on the same model works
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with PrivateStep(model, optimizer, max_grad_norm=C, noise_multiplier=1.0, expected_batch_size=2) as private:
            private.step(np.array([0, 1]), taker(model, batch))
            assert list(model.state_dict()) == keys
    assert vars(next(p for p in model.parameters() if p.requires_grad)) == plain
    assert not any(m._forward_hooks or m._backward_hooks or hasattr(m, "activations") for m in model.modules())
    with raises(PrivacyError, "step-closed"):
        private.step(np.array([0]), taker(model, batch))


def test_a_failed_loss_leaves_no_hooks() -> None:
    model, batch = peft_model("bert")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def half_way(part: np.ndarray) -> torch.Tensor:
        taker(model, batch)(part)
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        PrivateStep(model, optimizer, max_grad_norm=C, noise_multiplier=1.0, expected_batch_size=2) as private,
    ):
        private.step(np.array([0, 1]), half_way)
    assert not any(m._forward_hooks or hasattr(m, "activations") for m in model.modules())


def test_adamw_and_a_term_after_the_noise() -> None:
    """FedProx's pull is added to the noisy mean, where it is neither clipped nor noised."""
    model = torch.nn.Linear(2, 1, bias=False).double()
    anchor = model.weight.detach().clone() + 7.0
    seen: list[torch.Tensor] = []

    def pull() -> None:
        assert model.weight.grad is not None
        seen.append(model.weight.grad.clone())
        model.weight.grad += model.weight.detach() - anchor

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    before = model.weight.detach().clone()
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 1e-6, "expected_batch_size": 1.0}
    with PrivateStep(model, optimizer, after_noise=pull, **settings) as private:
        private.step(np.array([0]), lambda part: model(torch.full((len(part), 2), 1e3, dtype=torch.float64)).squeeze(1))
    assert float(seen[0].norm()) == pytest.approx(1.0, abs=1e-4)
    assert torch.allclose(model.weight.detach() - before, torch.full((1, 2), 0.01, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("name", ["max_grad_norm", "noise_multiplier", "expected_batch_size", "physical_batch_size"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    model = torch.nn.Linear(2, 1)
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0} | {name: value}
    with raises(PrivacyError, "out-of-range", name):
        PrivateStep(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda x: x[:, None]])
def test_losses_that_are_not_one_for_each_example_are_refused(reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        PrivateStep(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0) as private,
        raises(PrivacyError, "loss-not-per-example"),
    ):
        private.step(np.arange(3), lambda part: reduce(model(torch.ones(len(part), 2)).squeeze(1)))


def test_a_module_that_flattens_the_batch_is_refused_in_any_step() -> None:
    class Windows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(x.reshape(-1, 2)).reshape(len(x), -1).sum(1)

    model = Windows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        PrivateStep(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0) as private,
        raises(PrivacyError, "batch-dimension-lost", "line", 12, 3),
    ):
        private.step(np.arange(3), lambda part: model(torch.ones(len(part), 8)))


def test_an_optimizer_over_other_tensors_is_refused() -> None:
    model = torch.nn.Linear(2, 1)
    stale = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight = torch.nn.Parameter(model.weight.detach().clone())  # as a late move to a device may do
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0}
    with raises(PrivacyError, "optimizer-mismatch", "'weight'"):
        PrivateStep(model, stale, **settings)
    more = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with raises(PrivacyError, "optimizer-mismatch"):
        PrivateStep(model, more, **settings)


def test_adapters_that_do_not_move_are_noticed() -> None:
    class Lost(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            """Steps a copy on another device, say."""

    model = torch.nn.Linear(2, 1)
    settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0}
    with (
        PrivateStep(model, Lost(model.parameters(), lr=0.1), **settings) as private,
        raises(PrivacyError, "parameter-unchanged", "'weight'"),
    ):
        private.step(np.arange(3), lambda part: model(torch.ones(len(part), 2)).squeeze(1))


# ---------------------------------------------------------------------------------------------- sampling and noise


def test_poisson_samples_have_the_law_of_independent_coins() -> None:
    n, q, steps = 50, 0.1, 4000
    member = np.zeros((steps, n), dtype=bool)
    for row, indices in zip(member, poisson_batches(n, q, steps, np.random.default_rng(0)), strict=True):
        assert (np.diff(indices) > 0).all()
        row[indices] = True
    sizes = member.sum(1)
    assert sizes.mean() == pytest.approx(n * q, abs=0.15)
    assert sizes.var() == pytest.approx(n * q * (1 - q), rel=0.1)  # 0 for fixed batches
    assert np.abs(member.mean(0) - q).max() < 0.025
    assert np.abs(np.corrcoef(member.T) - np.eye(n)).max() < 0.08  # shuffled epochs are negatively correlated
    assert (sizes == 0).mean() == pytest.approx(0.9**50, rel=0.5)


def test_poisson_samples_of_nothing_and_of_everything() -> None:
    assert [len(b) for b in poisson_batches(0, 0.5, 3)] == [0, 0, 0]
    assert [list(b) for b in poisson_batches(4, 1.0, 2)] == [[0, 1, 2, 3]] * 2
    with raises(PrivacyError, "out-of-range", 0.0):
        list(poisson_batches(4, 0.0, 2))


def test_secret_draws_ignore_every_seed_that_a_run_sets() -> None:
    noise, coins = [], []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        noise.append(torch.randn(4, generator=secret_generator()))
        coins.append(secret_rng().random(4))
    assert not torch.equal(noise[0], noise[1])
    assert not np.array_equal(coins[0], coins[1])


def test_noise_has_more_seeds_than_can_be_tried() -> None:
    """torch looks at 32 bits of a CPU seed; the secret generator's state is drawn whole."""
    assert torch.equal(*(torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32)))
    words = secret_generator().get_state()[24 : 24 + 624 * 8].view(624, 8)[:, :4]
    state = [int.from_bytes(bytes(word.tolist()), "little") for word in words]
    assert len(set(state)) > 620
    follows = 1812433253 * (state[0] ^ (state[0] >> 30)) + 1  # what a 32-bit seed makes of its second word
    assert state[1] != follows % 2**32
    values = torch.randn(200_000, generator=secret_generator(), dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(0.0, abs=0.015)
    assert float(values.std()) == pytest.approx(1.0, abs=0.01)
    assert int((values.abs() > 3).sum()) == pytest.approx(540, rel=0.25)
