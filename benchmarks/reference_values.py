"""The known errors of the known rules, measured by this package's own rules beside the published figures.

    python benchmarks/reference_values.py                # all, about a quarter of a minute on one core
    python benchmarks/reference_values.py --draws 1      # one draw of each construction instead of the mean of five

All in float64 with d = 256, r = 8 and 10 clients of equal weight unless a row says otherwise. Nothing below is a stored
result: a figure is computed from drawn factors each time. Where the construction behind a published figure was not
published, the row says which one is used here, and what comes out need not be the published digit.

Constructions. N is a matrix of independent standard normals; the global factors are A0, B0 ~ N.
drift t:          A_k = A0 + t N, B_k = B0 + N.
both drift t:     A_k = A0 + t N, B_k = B0 + t N.
independent A:    A_k = N, B_k = B0 + N.
rotation t:       A_k = Q_k (A0 + 0.2 N), B_k = (B0 + 0.2 N) Q_k^T with Q_k = expm(t (N - N^T) / sqrt(2)).
mixed ranks:      drift 0.3 with the first r_k rows of A0 and columns of B0; scale 1.
noise:            drift 0.3 of both in units of their size, A0 as PEFT draws it (Kaiming) and B0 of the same size;
                  Gaussian noise of the given standard deviation is then added to the averaged factors (to B alone for
                  FFA-LoRA).

Errors come from the factors by QR, whose own rounding is about 1e-15; the rows "dense" are of multiplied-out matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pair
from fedlora.aggregators import Aggregator, ClientSpec, ClientUpdate, broadcast_change
from fedlora.aggregators.fair import Fair
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flora import Flora
from fedlora.lowrank import DeltaSum, compress, relative_error, stack

D, RANK, CLIENTS = 256, 8, 10
MIXED = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    published: str
    measured: float
    note: str = ""


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """N."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ideal(pairs: Sequence[LoraPair]) -> DeltaSum:
    """D* for equal weights, times the number of clients."""
    total = DeltaSum()
    for pair in pairs:
        total.add({"m": pair})
    return total


def error(made: LoraPair, pairs: Sequence[LoraPair]) -> float:
    """|D - D*| / |D*| for a D that no rule of the package makes."""
    actual = DeltaSum()
    actual.add({"m": made})
    return relative_error(actual, ideal(pairs), len(pairs))


def rule_error(rule: Aggregator, pairs: Sequence[LoraPair]) -> float:
    """The aggregation error of a rule for clients of equal weight."""
    largest = max(pairs, key=lambda pair: pair.rank)
    before = rule.init(AdapterState({"m": LoraPair(largest.A, torch.zeros_like(largest.B), largest.scale)}))
    updates = [ClientUpdate(k, AdapterState({"m": pair}), 1.0) for k, pair in enumerate(pairs)]
    return relative_error(broadcast_change(before, rule.aggregate(before, updates)), ideal(pairs), len(pairs))


def dense_error(rule: Aggregator, pairs: Sequence[LoraPair]) -> float:
    """The same as `rule_error`, from d_out x d_in matrices."""
    largest = max(pairs, key=lambda pair: pair.rank)
    before = rule.init(AdapterState({"m": LoraPair(largest.A, torch.zeros_like(largest.B), largest.scale)}))
    after = rule.aggregate(before, [ClientUpdate(k, AdapterState({"m": pair}), 1.0) for k, pair in enumerate(pairs)])
    made = sum(c * pair.delta() for c, pair in broadcast_change(before, after).terms("m"))
    wanted = sum(pair.delta() for pair in pairs) / len(pairs)
    return float((made - wanted).norm() / wanted.norm())


def drift(generator: torch.Generator, of_A: float, of_B: float = 1.0, ranks: Sequence[int] = ()) -> list[LoraPair]:
    """A_k = A0 + of_A N, B_k = B0 + of_B N, each with its first r_k rows and columns."""
    ranks = ranks or (RANK,) * CLIENTS
    A0, B0 = normal(generator, max(ranks), D), normal(generator, D, max(ranks))
    return [
        LoraPair(A0[:r] + of_A * normal(generator, r, D), B0[:, :r] + of_B * normal(generator, D, r), 1.0)
        for r in ranks
    ]


def independent(generator: torch.Generator) -> list[LoraPair]:
    """A_k = N, B_k = B0 + N."""
    return [LoraPair(normal(generator, RANK, D), pair.B, 1.0) for pair in drift(generator, 0.0)]


def rotated(generator: torch.Generator, angle: float) -> tuple[list[LoraPair], Tensor]:
    """Clients that hold nearly the same product in rotated factors, and the A0 that was broadcast to them."""
    A0, B0 = normal(generator, RANK, D), normal(generator, D, RANK)
    pairs = []
    for _ in range(CLIENTS):
        skew = normal(generator, RANK, RANK)
        Q = torch.linalg.matrix_exp(angle * (skew - skew.T) / 2**0.5)
        A, B = A0 + 0.2 * normal(generator, RANK, D), B0 + 0.2 * normal(generator, D, RANK)
        pairs.append(LoraPair(Q @ A, B @ Q.T, 1.0))
    return pairs, A0


def aligned(pairs: Sequence[LoraPair], A0: Tensor) -> list[LoraPair]:
    """FedRot: each client's factors turned to the broadcast by the orthogonal Procrustes solution."""
    out = []
    for pair in pairs:
        U, _, Vh = torch.linalg.svd(A0 @ pair.A.T)
        out.append(LoraPair(U @ Vh @ pair.A, pair.B @ (U @ Vh).T, pair.scale))
    return out


def zero_padded(pairs: Sequence[LoraPair]) -> LoraPair:
    """The mean of the factors, padded with zeros to the largest rank: what HetLoRA starts from."""
    rank = max(pair.rank for pair in pairs)
    A, B = torch.zeros(rank, D, dtype=torch.float64), torch.zeros(D, rank, dtype=torch.float64)
    for pair in pairs:
        A[: pair.rank] += pair.A / len(pairs)
        B[:, : pair.rank] += pair.B / len(pairs)
    return LoraPair(A, B, 1.0)


def best(pairs: Sequence[LoraPair], rank: int) -> LoraPair:
    """D* cut to a rank by the SVD of the stack."""
    return compress(stack([(1 / len(pairs), pair) for pair in pairs]), rank)


def p_on_both_sides(pairs: Sequence[LoraPair]) -> LoraPair:
    """The stack with p_k on A and on B: the mistake of several public implementations."""
    p = 1 / len(pairs)
    return LoraPair(torch.cat([p * pair.A for pair in pairs]), torch.cat([p * pair.B for pair in pairs], dim=1), 1.0)


def scale_left_out(generator: torch.Generator) -> float:
    """Mixed ranks under rsLoRA with one alpha: s_k = alpha / sqrt(r_k), and a server that uses one s for all."""
    pairs = [
        LoraPair(pair.A, pair.B, 16 / rank**0.5)
        for pair, rank in zip(drift(generator, 0.3, ranks=MIXED), MIXED, strict=True)
    ]
    forgotten = stack([(1 / len(pairs), LoraPair(pair.A, pair.B, pairs[0].scale)) for pair in pairs])
    return error(forgotten, pairs)


def noise_errors(generator: torch.Generator, std: float) -> tuple[float, float]:
    """Noise on the averaged factors: the error of LoRA (A and B), and of FFA-LoRA (B over a frozen A)."""
    A0 = fresh_pair(PairShape(D, D, RANK, 1.0), int(generator.initial_seed()), torch.float64).A
    size = float(A0.std())
    As = [A0 + 0.3 * size * normal(generator, RANK, D) for _ in range(CLIENTS)]
    B0 = size * normal(generator, D, RANK)
    Bs = [B0 + 0.3 * size * normal(generator, D, RANK) for _ in range(CLIENTS)]
    noise_A, noise_B = std * normal(generator, RANK, D), std * normal(generator, D, RANK)
    errors = []
    for factors, noise in ((As, noise_A), ([A0] * CLIENTS, torch.zeros_like(noise_A))):
        rule = FedAvg()
        pairs = [LoraPair(A, B, 1.0) for A, B in zip(factors, Bs, strict=True)]
        updates = [ClientUpdate(k, AdapterState({"m": pair}), 1.0) for k, pair in enumerate(pairs)]
        averaged = rule.aggregate(rule.init(AdapterState({"m": pairs[0]})), updates).adapter.pairs["m"]
        errors.append(error(LoraPair(averaged.A + noise, averaged.B + noise_B, 1.0), [averaged]))
    return errors[0], errors[1]


def mebibytes() -> dict[str, float]:
    """Bytes per client and round of RoBERTa-base, q and v of 12 layers, r = 8, float32, 10 clients."""
    pairs = {
        f"{layer}.{m}": LoraPair(torch.ones(RANK, 768), torch.zeros(768, RANK), 2.0)
        for layer in range(12)
        for m in ("q", "v")
    }
    adapter = AdapterState(pairs)
    spec = ClientSpec(0, adapter.layout)
    out = {}
    for name, rule in (("LoRA", FedAvg()), ("FFA-LoRA", FfaLora())):
        plan = rule.plan(rule.init(adapter), spec)
        out[f"{name} up"] = plan.adapter.nbytes(plan.sends) / MIB
    out["LoRA down"] = FedAvg().plan(FedAvg().init(adapter), spec).adapter.nbytes() / MIB
    flora = Flora()
    before = flora.init(adapter)
    updates = [ClientUpdate(k, flora.plan(before, spec).adapter, 1.0) for k in range(CLIENTS)]
    plan = flora.plan(flora.aggregate(before, updates), spec)
    out["FLoRA down"] = sum(base_update.change.nbytes() for base_update in plan.base_updates) / MIB
    out["Fed-SB up"] = len(pairs) * RANK * RANK * 4 / MIB
    return out


def rows(draws: int = 5) -> list[Row]:
    """The table."""

    def over(measure: Callable[[torch.Generator], float]) -> float:
        return mean(measure(torch.Generator().manual_seed(seed)) for seed in range(draws))

    def of(rule: Aggregator, clients: Callable[[torch.Generator], list[LoraPair]]) -> float:
        return over(lambda generator: rule_error(rule, clients(generator)))

    ours = "construction ours"
    table = [
        Row("FedAvg, drift 0.3", "0.084", of(FedAvg(), lambda g: drift(g, 0.3)), ours),
        Row("FedAvg, drift 1", "0.26", of(FedAvg(), lambda g: drift(g, 1.0)), ours),
        Row("FedAvg, independent A", "0.67", of(FedAvg(), independent), ours),
        Row("FLoRA, independent A, dense", "3e-16", over(lambda g: dense_error(Flora(), independent(g)))),
        Row("FLoRA, mixed ranks, by QR", "3e-16", of(Flora(), lambda g: drift(g, 1.0, ranks=MIXED))),
        Row("FFA-LoRA, one frozen A, dense", "0", over(lambda g: dense_error(FfaLora(), drift(g, 0.0)))),
        Row(
            "p on A and on B (wrong), less 1 - 1/K",
            "0",
            over(lambda g: error(p_on_both_sides(pairs := independent(g)), pairs)) - (1 - 1 / CLIENTS),
        ),
        Row(
            "s_k left out, alpha fixed, mixed ranks",
            "0.59",
            over(scale_left_out),
            "construction ours: rsLoRA, drift 0.3",
        ),
        Row(
            "zero-padded mixed ranks",
            "0.48",
            over(lambda g: error(zero_padded(pairs := drift(g, 0.3, ranks=MIXED)), pairs)),
            ours,
        ),
    ]
    for rank, published in ((4, "0.72"), (8, "0.585"), (16, "0.40"), (64, "0.07")):
        cut = over(lambda g, rank=rank: error(best(pairs := drift(g, 0.3, ranks=MIXED), rank), pairs))
        table.append(Row(f"SVD cut to rank {rank}, mixed ranks", published, cut, ours))
    for name, rule, published in (("FedAvg", FedAvg(), "0.1036"), ("LoRA-FAIR", Fair(), "0.1025")):
        measured = of(rule, lambda g: drift(g, 0.6, 0.6))
        table.append(Row(f"{name}, both drift 0.6", published, measured, ours))
    table.append(
        Row(
            f"best rank {RANK} there",
            "0.1014",
            over(lambda g: error(best(pairs := drift(g, 0.6, 0.6), RANK), pairs)),
            "published for rank 16",
        )
    )
    for name, rule, published in (("FedAvg", FedAvg(), "0.453"), ("LoRA-FAIR", Fair(), "0.050")):
        measured = of(rule, lambda g: rotated(g, 0.3)[0])
        table.append(Row(f"{name}, rotation 0.3", published, measured, ours))
    table.append(Row("FedRot, rotation 0.3", "0.015", of(FedAvg(), lambda g: aligned(*rotated(g, 0.3))), ours))
    for std, lora, ffa in ((1e-3, "0.034", "0.027"), (1e-2, "0.345", "0.266"), (1e-1, "7.64", "2.67")):
        table.append(Row(f"noise {std:g}, LoRA", lora, over(lambda g, s=std: noise_errors(g, s)[0]), ours))
        table.append(Row(f"noise {std:g}, FFA-LoRA", ffa, over(lambda g, s=std: noise_errors(g, s)[1]), ours))
    published = {
        "LoRA up": "1.125",
        "LoRA down": "1.125",
        "FFA-LoRA up": "0.5625",
        "FLoRA down": "11.25",
        "Fed-SB up": "0.006",
    }
    for name, value in mebibytes().items():
        table.append(Row(f"MiB a client and round, {name}", published[name], value))
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5, help="each figure is the mean over this many draws")
    print("| quantity | published | measured | |\n|---|---|---|---|")
    for row in rows(parser.parse_args().draws):
        print(f"| {row.what} | {row.published} | {row.measured:.4g} | {row.note} |")


if __name__ == "__main__":
    main()
