"""Parts that stay with the clients: `strategy = {name = "keep", keep = ["dense"], inner = {name = "flora"}}`.

Each client trains all that the inner rule asks for, and keeps some of it: the next time that it is asked, it goes on
from its own values. The others are sent, and the inner rule aggregates them alone: of a part that is kept it gets the
value before training, for every client.

    w_k = (u, v_k):      u <- inner(u_1, ..., u_K),      v_k <- v_k after client k's training, if it took part.

FedPer (Arivazhagan et al. 2019, arXiv 1912.00818, algorithms 1 and 2): u is the adapter, v_k the head. FedSA-LoRA (Guo
et al., ICLR 2025, arXiv 2410.01463, section 4): u are the A, of which the mean is taken, v_k are the B and the head.

FedRep (Collins, Hassani, Mokhtari, Shakkottai, ICML 2021, arXiv 2102.07078, algorithm 1) is FedPer with clients that
train the head first, with the adapter as it came, and then the adapter, with the head as it is by then.

That of any parts is FedSim (Pillutla et al., ICML 2022, arXiv 2204.03809, algorithm 1).

A client that has not trained yet has the v that all began with: with FedSA-LoRA's B = 0 that is the base model.

A factor of a pair can be kept where the inner rule treats all tensors alike. A rule that looks at products, or freezes
a factor, needs both of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar, final

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators._around import Around, Inner, require_fit
from fedlora.aggregators._base import (
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    names_claiming,
    rules,
)
from fedlora.aggregators.fedavg import FedAvg
from fedlora.errors import ConfigError, RuleError, nearest


class Keeping(Around):
    """A rule whose clients keep what `keep` names: parts ("A", "B", "dense"), or patterns of tensors' names."""

    keep: tuple[str, ...]

    claims: ClassVar[Claim] = Claim.LINEAR | Claim.PERSONAL
    group: ClassVar[str] = "personal"

    def __post_init__(self) -> None:
        if not self.keep:
            raise ConfigError(
                "keep names nothing: name parts ('dense', 'A', 'B') or patterns of tensors' names, or use the inner "
                "rule alone",
                code="nothing-kept",
            )
        self.inherit(
            Claim.LINEAR | Claim.MIXED_RANKS | Claim.CHANGES_BASE | Claim.ROBUST | Claim.GAUGE_FREE, Claim.PERSONAL
        )
        self.require_alike(factor for factor in ("A", "B") if factor in self.keep)

    def require_alike(self, factors: Iterable[str]) -> None:
        """Raise `ConfigError` where a factor of a pair would be kept from an inner rule that needs both."""
        for factor in factors:
            if Claim.ANY_TENSORS not in self.inner.claims:
                raise ConfigError(
                    f"{type(self.inner).__name__} needs both factors of a pair, and its clients would keep {factor}: "
                    f"keep 'dense', or choose an inner rule that treats all tensors alike "
                    f"({', '.join(names_claiming(Claim.ANY_TENSORS))})",
                    code="factor-kept",
                )

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """The inner rule's.

        Raises:
            RuleError: an entry of `keep` names no tensor of the adapter, or all are kept.
            ConfigError: see `require_alike`.
        """
        tensors, kept = adapter.tensors(), self._names(adapter, self.keep)
        for entry in self.keep:
            if entry not in ALL_PARTS and not self._names(adapter, (entry,)):
                raise RuleError(
                    f"keep = {entry!r} names nothing of the adapter; {nearest(entry, [*ALL_PARTS, *tensors])}",
                    code="nothing-kept",
                )
        if not kept:
            raise RuleError(
                f"of {' and '.join(self.keep)}, which clients keep, the adapter has nothing: keep another part "
                f"({', '.join(part for part in sorted(ALL_PARTS) if adapter.tensors((part,)))})",
                code="nothing-kept",
            )
        self.require_alike(name for name in kept if name not in adapter.dense)
        if len(kept) == len(tensors):
            raise RuleError("clients keep everything and share nothing: keep less", code="nothing-shared")
        return super().init(adapter, seed=seed)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The inner rule's, of which the client sends all but what it keeps."""
        plan = super().plan(state, client)
        kept = self._names(plan.adapter, self.keep)
        parts = {part: plan.adapter.tensors((part,)).keys() for part in plan.sends}
        whole = {part for part, names in parts.items() if not names & kept}
        single = {name for part in parts.keys() - whole for name in parts[part] - kept}
        return replace(plan, sends=frozenset(whole | single))

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's, of what was sent; what is kept stays as it began.

        Raises:
            RuleError: see the inner rule.
        """
        after = self.inner.aggregate(self.inner_state(state), self._without_kept(state, updates))
        kept = state.adapter.tensors(self._names(state.adapter, self.keep))
        return self.outer_state(replace(after, adapter=after.adapter.with_tensors(kept)))

    def _without_kept(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        for update in updates:
            plan = self.plan(state, ClientSpec(update.client_id, update.adapter.layout, update.base_version))
            require_fit(update, plan)
            yield replace(update, adapter=update.adapter.with_tensors(plan.kept))
            del update

    @staticmethod
    def _names(adapter: AdapterState, keep: tuple[str, ...]) -> set[str]:
        """Names of the tensors that some entries of `keep` name."""
        named = {name for name in adapter.tensors() if any(fnmatchcase(name, entry) for entry in keep)}
        return named | adapter.tensors(keep).keys()


@final
@rules.register("keep")
@dataclass(frozen=True)
class Keep(Keeping):
    """Clients keep what you name, and the inner rule aggregates the rest.

    Args:
        keep: parts ("dense", "A", "B"), or patterns of tensors' names such as "*layer.11.*".
        inner: any rule; for factors one that treats all tensors alike.

    Raises:
        ConfigError: nothing is kept, or a factor that the inner rule needs.
    """

    keep: tuple[str, ...] = ("dense",)
    inner: Inner = field(default_factory=FedAvg)

    paper: ClassVar[str] = "Pillutla et al., ICML 2022, arXiv 2204.03809"


@final
@rules.register("fedper")
@dataclass(frozen=True)
class FedPer(Keeping):
    """Each client keeps a head of its own; the inner rule aggregates the adapter.

    Args:
        inner: any rule.
    """

    inner: Inner = field(default_factory=FedAvg)

    keep: ClassVar[tuple[str, ...]] = ("dense",)  # type: ignore[misc]
    paper: ClassVar[str] = "Arivazhagan et al. 2019, arXiv 1912.00818"


@final
@rules.register("fedrep")
@dataclass(frozen=True)
class FedRep(Keeping):
    """FedPer, whose clients train the head first and then the adapter.

    Args:
        head_times: how many times as long as [train] says the head is trained; the adapter is trained as long as that
            says. (The paper's experiments have 10 epochs of the head and 1 of the rest.)
        inner: any rule.

    Raises:
        ConfigError: head_times is below 1.
    """

    head_times: int = 1
    inner: Inner = field(default_factory=FedAvg)

    keep: ClassVar[tuple[str, ...]] = ("dense",)  # type: ignore[misc]
    paper: ClassVar[str] = "Collins et al., ICML 2021, arXiv 2102.07078"

    def __post_init__(self) -> None:
        if self.head_times < 1:
            raise ConfigError(
                f"fedrep: head_times must be 1 or more, not {self.head_times!r}: to train head and adapter together "
                "use fedper",
                code="out-of-range",
            )
        super().__post_init__()

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The inner rule's, of which the client trains the head first, and sends all but that."""
        return replace(super().plan(state, client), first=frozenset({"dense"}), first_times=self.head_times)


@final
@rules.register("fedsa")
@dataclass(frozen=True)
class FedSaLora(Keeping):
    """A <- sum_k p_k A_k; each client keeps a B and a head of its own.

    Args:
        inner: a rule that treats all tensors alike.

    Raises:
        ConfigError: the inner rule does not.
    """

    inner: Inner = field(default_factory=FedAvg)

    keep: ClassVar[tuple[str, ...]] = ("B", "dense")  # type: ignore[misc]
    paper: ClassVar[str] = "Guo et al., ICLR 2025, arXiv 2410.01463"
