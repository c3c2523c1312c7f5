"""Direct checks of user-level privacy: what `ServerDP.aggregate` makes of updates, against what its account says.

C = clip norm, z = noise multiplier, p_k = weight of client k over the sum of the weights that came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientSpec, ClientUpdate, GlobalState
from fedlora.privacy import server_dp as central
from fedlora.privacy.accounting import Entry
from fedlora.privacy.checks import (
    ALPHA,
    Check,
    excluded_bits,
    expanded_from_a_word,
    independence,
    largest,
    noise_grain,
    noise_scale,
    noise_shape,
)
from fedlora.privacy.dpsgd import secret_generator
from fedlora.privacy.server_dp import CLIP, ServerDP

QUIET = 1e-9
"""The noise multiplier where the mean is measured before its noise."""
ROUNDS = 32


def check_clients(rule: ServerDP, adapter: AdapterState, weights: Sequence[float], generators: int) -> Iterator[Check]:
    """Check the aggregation of unit = "client".

    Args:
        rule: it must give the global model the mean of its updates (FedAvg does).
        adapter: the global one; its values do not matter.
        weights: of the clients that answer, the largest first.
        generators: how many rounds' noise is watched for repetitions.
    """
    start = adapter.with_tensors({name: torch.zeros_like(value).double() for name, value in adapter.tensors().items()})
    few = weights[: max(2, rule.minimum_cohort)]
    cohorts = {"": weights} | ({"most drop out": few} if len(few) < len(weights) else {})
    yield from _sensitivity(rule, start, weights)
    yield from _noise(rule, start, cohorts, generators)
    if rule.adaptive:
        yield from _count(rule, weights)
    if rule.minimum_cohort > 1:
        yield _dropped(rule, start, weights[: rule.minimum_cohort - 1])
    yield _account(rule)


def _sensitivity(rule: ServerDP, start: AdapterState, weights: Sequence[float]) -> Iterator[Check]:
    """The mean before its noise, in units of C max p_k."""
    quiet = replace(rule, noise_multiplier=QUIET, count_noise_multiplier=None, minimum_cohort=1)
    generator = secret_generator()
    state = quiet.init(start)
    clip = float(state.memory[CLIP])
    unit = clip * max(weights) / sum(weights)
    sent = start.tensors(rule.plan(state, _spec(start)).sends)

    def towards(length: float, only: str | None = None) -> dict[str, Tensor]:
        draws = {name: torch.randn(value.shape, generator=generator).double() for name, value in sent.items()}
        if only is not None:
            draws = {name: value * (name == only) for name, value in draws.items()}
        norm = math.sqrt(sum(float(value.square().sum()) for value in draws.values()))
        return {name: value * (length / norm) for name, value in draws.items()}

    def mean(changes: Sequence[dict[str, Tensor] | None]) -> Tensor:
        updates = [
            ClientUpdate(k, start if change is None else start.with_tensors(change), weight)
            for k, (change, weight) in enumerate(zip(changes, weights, strict=True))
        ]
        return _flat(quiet.aggregate(quiet.init(start), updates).adapter, sent) / unit

    others: list[dict[str, Tensor] | None] = [towards(clip * (0.3 + k)) for k in range(len(weights) - 1)]
    without = mean([None, *others])
    worst: dict[str, dict[str, Tensor]] = {"far along all tensors": towards(1e3 * clip)}
    worst |= {f"far along {name} alone": towards(1e3 * clip, name) for name in list(sent)[-3:]}
    broken = towards(clip)
    first = next(iter(broken))
    broken[first] = torch.full_like(broken[first], math.nan)
    moved = [float((mean([change, *others]) - without).norm()) for change in (*worst.values(), broken)]
    yield largest("one client more moves the mean by", moved, 1 + 1e-6, "C max p", reached=0.999)
    several: list[dict[str, Tensor] | None] = [towards(1e3 * clip), *others]
    parts = torch.stack(
        [mean([change if i == k else None for i in range(len(several))]) for k, change in enumerate(several)]
    )
    yield largest("a mean less its clients' parts", [float((mean(several) - parts.sum(0)).norm())], 1e-5, "C max p")


def _noise(
    rule: ServerDP, start: AdapterState, cohorts: dict[str, Sequence[float]], generators: int
) -> Iterator[Check]:
    """Rounds in which nobody changes anything: what moves is noise."""
    draws: dict[str, Tensor] = {}
    rounds: list[Tensor] = []
    for label, weights in cohorts.items():
        for number in range(1, 1 + ROUNDS // len(cohorts)):
            state = rule.init(start)
            unit = rule.update_multiplier * float(state.memory[CLIP]) * max(weights) / sum(weights)
            after = rule.aggregate(state, [ClientUpdate(k, start, weight) for k, weight in enumerate(weights)])
            sent = after.adapter.tensors(rule.plan(state, _spec(start)).sends)
            for name, value in sent.items():
                draws[f"{name}, round {number}{', ' * bool(label)}{label}"] = value / unit
            rounds.append(_flat(after.adapter, sent) / unit)
    yield noise_scale("noise: each tensor and round", draws)
    by_tensor: dict[str, list[Tensor]] = {}
    for name, value in draws.items():
        by_tensor.setdefault(name.split(", round ")[0], []).append(value.flatten())
    yield noise_scale("noise: each tensor", {name: torch.cat(each) for name, each in by_tensor.items()})
    yield noise_shape("noise: its law", torch.cat(rounds)[:1_000_000])
    yield noise_grain("noise: its grain", rounds[0])

    small = AdapterState({}, {"line": torch.zeros(256, dtype=torch.float64)})
    still = [ClientUpdate(k, small, weight) for k, weight in enumerate(next(iter(cohorts.values())))]
    fresh = [_flat(rule.aggregate(rule.init(small), still).adapter, small.dense) for _ in range(generators)]
    every = torch.stack([row[:100_000] for row in rounds])
    most = max(value.numel() for value in draws.values())
    least = min(value.numel() for value in draws.values() if value.numel() >= min(16, most))
    long = [torch.cat([value[:least] for value in each]) for each in by_tensor.values() if len(each[0]) >= least]
    groups = [torch.stack(fresh), every, torch.stack(long)]
    bits = excluded_bits(generators)
    yield independence(f"noise: fresh ({bits}-bit seeds seen)", groups)
    short = expanded_from_a_word(central.secret_generator())  # type: ignore[attr-defined]  # the very one that `aggregate` uses
    yield Check("noise: its generator", "from 32 bits" if short else "from more than 32 bits", "more", short)


def _count(rule: ServerDP, weights: Sequence[float]) -> Iterator[Check]:
    """The count query of adaptive clipping, read from where the clip norm went."""
    start = AdapterState({}, {"line": torch.zeros(1, dtype=torch.float64)})
    n = len(weights)

    def count(rule: ServerDP, far: Sequence[float]) -> float:
        state = rule.init(start)
        clip = float(state.memory[CLIP])
        updates = [
            ClientUpdate(k, AdapterState({}, {"line": torch.tensor([length * clip]).double()}), weight)
            for k, (length, weight) in enumerate(zip(far, weights, strict=True))
        ]
        after: GlobalState = rule.aggregate(state, updates)
        return (math.log(clip / float(after.memory[CLIP])) / rule.clip_lr + rule.quantile) * n

    quiet = replace(rule, noise_multiplier=QUIET, count_noise_multiplier=None)
    rest = [0.0] * (n - 1)
    gap = abs(count(quiet, [0.0, *rest]) - count(quiet, [1e3, *rest]))
    yield largest("one client more moves the count by", [gap], 1 + 1e-5, "clients", reached=0.999)
    draws = torch.tensor([count(rule, [0.0] * n) - n for _ in range(500)]) / rule.count_multiplier
    yield noise_scale("noise: the count", {"500 rounds": draws}, ALPHA)


def _dropped(rule: ServerDP, start: AdapterState, weights: Sequence[float]) -> Check:
    """A round below the minimum cohort shows nothing, and costs nothing."""
    state = rule.init(start)
    there = start.with_tensors({name: torch.ones_like(value) for name, value in start.tensors().items()})
    after = rule.aggregate(state, [ClientUpdate(k, there, weight) for k, weight in enumerate(weights)])
    same = all(torch.equal(value, start.tensors()[name]) for name, value in after.adapter.tensors().items())
    same &= float(after.memory[CLIP]) == float(state.memory[CLIP])
    return Check("a round of too few clients", "changes nothing" if same else "shows", "changes nothing", not same)


def _account(rule: ServerDP) -> Check:
    """One round's entry against the noise that was checked: of the updates and, under adaptive clipping, the count."""
    parts = rule.update_multiplier**-2 + (rule.count_multiplier**-2 if rule.adaptive else 0.0)
    kept, checked = rule.entry(), Entry(1.0, parts**-0.5, 1)
    bad = kept.sample_rate < 1 or kept.steps < 1 or kept.noise_multiplier > checked.noise_multiplier * (1 + 1e-9)
    return Check("the ledger's entry", f"z {kept.noise_multiplier:.4g}", f"at most {checked.noise_multiplier:.4g}", bad)


def _flat(adapter: AdapterState, names: Iterable[str]) -> Tensor:
    tensors = adapter.tensors()
    return torch.cat([tensors[name].double().flatten() for name in names])


def _spec(adapter: AdapterState) -> ClientSpec:
    return ClientSpec(0, adapter.layout)
