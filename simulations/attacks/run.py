"""Which rules stand clients that lie? See README.md.

    fedlora assets digits digits-vit
    python simulations/attacks/run.py    # a quarter of an hour of one core; what is done is not repeated

Ten clients, of which none, one or three lie, in a pool of clients of the study's own around fedlora's (`HostilePool`):
what a liar sends passes the server's checks, or does not, as a hostile node's would. The learning rate is chosen by
the *honest* run, on a seed that is not reported: see `rate_of`.

Each run adds a row to results.csv beside this file, and rows that are there are not run again: remove some to repeat
them. Writes table.md and plot.png of what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from fedlora.aggregators import Aggregator
from fedlora.compare import render_table
from fedlora.config import RunConfig, load_config
from fedlora.errors import ReplyError
from fedlora.federation.client_pool import (
    ClientEvaluation,
    ClientReply,
    Failure,
    Reply,
    RoundRequest,
    SimulatedClients,
)
from fedlora.federation.client_store import ClientStore
from fedlora.federation.local_clients import LocalClients, clients_of
from fedlora.federation.planner import Held, Planner
from fedlora.federation.screen import FIGURES, Screen
from fedlora.rng import derive
from fedlora.sweep.in_memory import ResultRows, run_in_memory
from fedlora.training.workspace import Workspace

HERE = Path(__file__).resolve().parent
MULTI_KRUM = "name='krum',keep=0.7"
MEAN = "mean (FedAvg)"
RULES = {
    MEAN: "name='fedavg'",
    "median": "name='median'",
    "trimmed mean": "name='trimmed_mean'",
    "centred clipping": "name='centred_clipping'",
    "geometric median": "name='geometric_median'",
    "norm bound": "name='norm_bound'",
    "Krum": "name='krum'",
    "multi-Krum": MULTI_KRUM,
    "FLTrust": "name='fltrust'",
    "multi-Krum of FLoRA": f"{MULTI_KRUM},inner={{name='flora'}}",
}
"""Names -> `strategy`; with the defaults a share of 0.3 may lie, and client 0, which never does, is FLTrust's root."""
CHOOSE, NEARLY = (MEAN, "multi-Krum of FLoRA"), 0.005
"""Rules whose honest runs choose a learning rate; the others, which average the same factors, have the mean's."""
RATES, START = (0.0031, 0.0056, 0.01, 0.018, 0.032, 0.056), (1, 2, 3)
CHOOSES, SEEDS = 100, (0, 1, 2)
HONEST, NONE = "none", 0
LIARS = (3, 1)
CLOSE = 0.02
KEYS = ["rule", "attack", "liars", "seed", "lr"]

# ------------------------------------------------------------------------------------------------- what liars send

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Attack:
    """A way to lie.

    Args:
        lie: what is sent in the place of the trained tensors, given these, the round's start, and a source of noise.
        flips: train on labels 9 - y.
        together: all send what the first of them does.
    """

    lie: Callable[[Tensors, Tensors, torch.Generator], Tensors] = lambda trained, _start, _noise: trained
    flips: bool = False
    together: bool = False


def times(factor: float) -> Callable[[Tensors, Tensors, torch.Generator], Tensors]:
    """The own step times a factor."""
    return lambda trained, start, _: {
        name: start[name] + factor * (value - start[name]) for name, value in trained.items()
    }


def noise(trained: Tensors, start: Tensors, generator: torch.Generator) -> Tensors:
    """A normal draw ten times as long as the own step."""
    drawn = {name: torch.randn(value.shape, generator=generator) for name, value in trained.items()}
    own = torch.cat([(value - start[name]).flatten() for name, value in trained.items()]).norm()
    size = torch.cat([value.flatten() for value in drawn.values()]).norm()
    return {name: start[name] + 10 * own / size * value for name, value in drawn.items()}


ATTACKS = {
    "sign flip": Attack(times(-4.0)),
    "collusion": Attack(times(-3.0), together=True),
    "label flip": Attack(flips=True),
    "Gaussian noise": Attack(noise),
    "scaling": Attack(times(30.0)),
    "NaN": Attack(times(float("nan"))),
}


class HostilePool(SimulatedClients):
    """The clients of a simulation, of whom the last ones lie; a lie goes through the server's checks as any reply.

    Args:
        config: of the run.
        rule: that plans.
        workspace: model, task and data of all clients.
        store: where clients keep what they do not send.
        attack: of the liars.
        liars: how many.
    """

    def __init__(
        self,
        config: RunConfig,
        rule: Aggregator,
        workspace: Workspace,
        store: ClientStore,
        attack: Attack,
        liars: int,
    ) -> None:
        super().__init__(clients_of(workspace))
        self._honest = LocalClients(config, rule, workspace, cohort=len(self._clients), store=store)
        self._config, self._workspace, self._attack = config, workspace, attack
        self._liars = sorted(self._clients)[len(self._clients) - liars :]
        self._planner, self._screen = Planner(config, rule, workspace), Screen(config, workspace)

    def train(self, request: RoundRequest) -> Generator[Reply, None, None]:
        """What honest clients send, and what liars do."""
        agreed: Tensors | None = None
        with self._labels():
            replies = list(self._honest.train(request))
        for reply in replies:
            if not isinstance(reply, ClientReply) or reply.client_id not in self._liars or reply.update is None:
                yield reply
                continue
            asked = self._planner.request(request, self._clients[reply.client_id], Held())
            trained, seed = reply.update.adapter.tensors(asked.plan.sends), derive(self._config.seed, "lie")
            source = torch.Generator().manual_seed(derive(seed, request.number, reply.client_id) % 2**63)
            lie = agreed or self._attack.lie(trained, asked.starts, source)
            agreed = lie if self._attack.together else None
            figures = {name: value for name, value in reply.figures.items() if name in FIGURES}
            figures["num_examples"] = int(reply.update.num_examples)
            try:
                yield self._screen.admit(reply, asked, lie, figures, request.expected)
            except ReplyError as error:
                yield replace(reply, update=None).failed(Failure("refused", str(error)))

    def evaluate(self, request: RoundRequest, parts: Sequence[str]) -> Generator[ClientEvaluation, None, None]:
        """As in any simulation."""
        yield from self._honest.evaluate(request, parts)

    @contextmanager
    def _labels(self) -> Iterator[None]:
        """Within, the liars' labels are flipped, if that is how they lie; nobody else trains on them."""
        data = self._workspace.data
        labels, liars = data.train.labels, self._liars if self._attack.flips else ()
        assert labels is not None
        try:
            for client in liars:
                labels[data.clients[client]] = 9 - labels[data.clients[client]]
            yield
        finally:
            for client in liars:
                labels[data.clients[client]] = 9 - labels[data.clients[client]]


# ---------------------------------------------------------------------------------------------------------- the runs


def accuracy(results: ResultRows, rule: str, attack: str, liars: int, seed: int, lr: float) -> float:
    """Of a run, after its last round."""
    (row,) = results.of((rule, attack, liars, seed, lr), lambda: [one_run(rule, attack, liars, seed, lr)])
    return float(row["accuracy"])


def one_run(rule: str, attack: str, liars: int, seed: int, lr: float) -> dict[str, float]:
    """A run with liars: the last accuracy, the one that was measured before it, and how many replies were refused."""
    changes = [f"strategy={{{RULES[rule]}}}", f"train.lr={lr}", f"seed={seed}"]
    config = load_config(HERE / "config.toml", changes)
    lines = run_in_memory(config, make_pool=partial(HostilePool, attack=ATTACKS.get(attack, Attack()), liars=liars))
    *_, before, last = [0.0, *(line["accuracy"] for line in lines if "accuracy" in line)]
    refused = sum(len(line.get("refused", {})) for line in lines)
    return {"accuracy": last, "before": before, "refused": refused, "rounds": len(lines) - 1}


def rate_of(rule: str, results: ResultRows) -> float:
    """The smallest rate whose honest run is within NEARLY of the best one's, of those tried and one beyond each end."""
    chooses, tried = rule if rule in CHOOSE else MEAN, list(START)
    while True:
        found = {k: accuracy(results, chooses, HONEST, NONE, CHOOSES, RATES[k]) for k in sorted(tried)}
        best = min(k for k, accuracy in found.items() if accuracy >= max(found.values()) - NEARLY)
        further = [k for k in (best - 1, best + 1) if 0 <= k < len(RATES) and k not in found]
        if not further:
            return RATES[best]
        tried += further


# ------------------------------------------------------------------------------------------------ what is written


def table(reported: pd.DataFrame, liars: int) -> pd.DataFrame:
    """A row for each rule: mean and standard deviation over the seeds, bold within CLOSE of the mean's honest run."""
    honest = reported[reported.attack == HONEST]
    base = honest[honest.rule == MEAN].set_index("seed").accuracy
    lines = []
    for rule in RULES:
        mine = reported[reported.rule == rule]
        line: list[str] = [rule, "".join(f"{rate:g}" for rate in mine.lr.unique())]
        for attack in (HONEST, *ATTACKS):
            found = mine[(mine.attack == attack) & mine.liars.isin((liars, NONE))].set_index("seed").accuracy
            text = "" if found.empty else f"{100 * found.mean():.1f}"
            if len(found) > 1:
                text += f" ± {100 * found.std():.1f}"
            close = bool(len(found)) and (base - found).mean() <= CLOSE
            line.append(f"**{text}**" if close else text)
        lines.append(line)
    return pd.DataFrame(lines, columns=["rule", "lr", "nobody lies", *ATTACKS])


def draw(reported: pd.DataFrame) -> None:
    """A panel for each attack, a line for each rule: hollow with one liar, full with three; a bar over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    honest = 100 * reported[(reported.attack == HONEST) & (reported.rule == MEAN)].accuracy.mean()
    there = [attack for attack in ATTACKS if (reported.attack == attack).any()]
    rows = -(-len(there) // 3)
    figure, panels = plt.subplots(
        rows, 3, figsize=(10.5, 0.6 + 3 * rows), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    places = {rule: -place for place, rule in enumerate(RULES)}
    for panel, attack in zip(panels.flat, there, strict=False):
        panel.axvspan(honest - 100 * CLOSE, honest + 100 * CLOSE, color="#009E73", alpha=0.15, linewidth=0)
        panel.axvline(honest, color="#009E73", linewidth=1)
        for liars, colour, shift in ((1, "#0072B2", 0.15), (3, "#D55E00", -0.15)):
            for rule, place in places.items():
                mine = reported[(reported.attack == attack) & (reported.liars == liars) & (reported.rule == rule)]
                values = 100 * mine.accuracy
                if len(values):
                    at = place + shift
                    panel.plot([values.min(), values.max()], [at, at], color=colour, linewidth=2, alpha=0.5)
                    face = colour if liars > 1 else "white"
                    panel.plot(values.mean(), at, "o", color=colour, markerfacecolor=face, markersize=5)
        panel.set_title(attack, fontsize=10)
        panel.set_yticks(list(places.values()), list(places), fontsize=8)
        panel.set_xlim(0, 100)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    marks = {
        "1 of 10 lies": plt.Line2D([], [], color="#0072B2", marker="o", markerfacecolor="white"),
        "3 of 10 lie": plt.Line2D([], [], color="#D55E00", marker="o"),
    }
    marks = {name: mark for name, mark in marks.items() if (reported.liars == int(name[0])).any()}
    for panel in panels.flat[len(there) :]:
        panel.set_visible(False)
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=2, frameon=False)
    title = "Test accuracy, %: mean and range of the seeds. Green: within two points of FedAvg where nobody lies"
    figure.suptitle(title, fontsize=10)
    figure.savefig(HERE / "plot.png", dpi=150, metadata={"Software": None})


def main() -> None:
    """Choose, run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-runs", action="store_true", help="tables and plot of the rows that are there")
    args = parser.parse_args()
    results = ResultRows(HERE / "results.csv", KEYS)
    if not args.no_runs:
        for liars in LIARS:
            for seed in SEEDS:
                for attack in (HONEST, *ATTACKS):
                    for rule in RULES:
                        rate = rate_of(rule, results)
                        cell = (attack, NONE if attack == HONEST else liars, seed)
                        if liars > 1 or attack == HONEST or not ATTACKS[attack].together:
                            accuracy(results, rule, *cell, rate)
    everything = pd.DataFrame(results.rows)
    reported = everything[everything.seed != CHOOSES]
    text = "\n".join(
        f"{liars} of 10 {'lie' if liars > 1 else 'lies'}:\n\n{render_table(table(reported, liars), 'markdown')}"
        for liars in LIARS
        if (reported.liars == liars).any()
    )
    (HERE / "table.md").write_text(text)
    print(text)
    draw(reported)


if __name__ == "__main__":
    main()
