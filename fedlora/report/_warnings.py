"""What a reader should know before believing a run's figures, in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fedlora.progress import format_metric
from fedlora.report._facts import Facts, better, interval, number, statuses

LARGE_ERROR = 0.25
"""Aggregation error above which a rule's broadcast is said to differ from the clients' mean."""
APPROXIMATE = 1e-3
"""Relative error above which the exported adapter is called an approximation."""
WEAK_EPSILON = 10.0
"""At this epsilon and above, e^epsilon bounds an attacker's odds by a factor of 22 000: hardly at all."""
SMALL_TEST = 0.03
"""Half of the 95% interval above which a test set is called small."""


def warnings(facts: Facts) -> list[str]:
    """One or two sentences each, the gravest first."""
    return [
        *_progress(facts),
        *_learning(facts),
        *_clients(facts),
        *_exactness(facts),
        *_privacy(facts),
        *_traces(facts),
    ]


def _progress(facts: Facts) -> Iterator[str]:
    if not facts.finished:
        yield (
            f"The run stopped after round {facts.done} of {facts.config.rounds}. "
            f"Go on with: fedlora run --resume {facts.path}"
        )
    lost = [record["round"] for record in facts.rounds if record.get("lost")]
    if lost:
        yield (
            f"{_rounds(lost)} changed nothing: too few clients answered in simulated time. "
            "A longer server.simulated_deadline_s or a lower server.quorum lets more of them count."
        )

    dropped = [record["round"] for record in facts.rounds if (record.get("rule") or {}).get("dropped") == 1]
    if dropped:
        yield f"{_rounds(dropped)} changed nothing: fewer clients answered than privacy.minimum_cohort asks for."


def _learning(facts: Facts) -> Iterator[str]:
    metric, evaluated = facts.metric, facts.evaluated
    broken = [r["round"] for r in facts.records if metric in r and number(r[metric]) is None]
    if broken:
        rounds = _rounds(broken, upper=False)
        yield f"After {rounds} the {_words(metric)} was no finite number: a lower train.lr may help."
    if len(evaluated) < 2:
        return
    first, last = evaluated[0], facts.last
    start, end = float(first[metric]), float(last[metric])
    if first["round"] == 0 and not better(metric, end, start):
        yield (
            f"Training did not help: {_words(metric)} {format_metric(metric, end)} at the end, "
            f"{format_metric(metric, start)} before."
        )
    best = evaluated[0]
    for record in evaluated:
        best = record if better(metric, record[metric], best[metric]) else best
    known, theirs = interval(facts, last), interval(facts, best)
    room = 0.02 * abs(end) if known is None else (known[1] - known[0]) / 2
    doubt = room if theirs is None else max(room, (theirs[1] - theirs[0]) / 2)  # best may be of a sample
    alike = known is not None or best.get("sample") == last.get("sample")
    if facts.config.selection is None and best["round"] > 0 and alike and abs(best[metric] - end) > doubt:
        yield (
            f"Round {best['round']} was better ({format_metric(metric, best[metric])}) than the last one "
            f"({format_metric(metric, end)}); adapter/ holds the last one. A table [selection] keeps the "
            "best, by examples of its own."
        )
    if first["round"] == 0:
        pairs = ((name, facts.value(first, domain=name), facts.value(last, domain=name)) for name in facts.domains)
        worse = [n for n, old, new in pairs if old is not None and new is not None and better(metric, old, new)]
        if worse:
            yield f"Worse than before the training: {_list(worse)}."
    if known is not None and known[1] - known[0] > 2 * SMALL_TEST:
        yield (
            f"The test set has only {facts.test_size} examples: the last accuracy lies between "
            f"{100 * known[0]:.0f} and {100 * known[1]:.0f}% (95% interval), and smaller differences mean nothing."
        )
    largest = number(last.get("majority_share"))
    if largest is not None and metric == "accuracy" and end <= largest + room:
        balanced = format_metric("balanced_accuracy", number(last.get("balanced_accuracy")))
        yield (
            f"Always answering with the largest class would reach {format_metric(metric, largest)}: the accuracy of "
            f"{format_metric(metric, end)} says little (balanced over the classes: {balanced})."
        )


def _clients(facts: Facts) -> Iterator[str]:
    reasons = Counter(str(why) for record in facts.rounds for why in (record.get("refused") or {}).values())
    if reasons:
        asked = sum(len(record.get("asked") or ()) for record in facts.rounds)
        why, _ = reasons.most_common(1)[0]
        yield f"{sum(reasons.values())} of {asked} replies were refused; most often because: {why}."
    missing = sum(len(record.get("missing") or ()) for record in facts.rounds)
    if missing:
        limit = facts.config.server.deadline_s
        yield f"{missing} replies were not there at the deadline (server.deadline_s = {limit:g})."
    answered = {k for record in facts.rounds for k, kind in statuses(record).items() if kind == "answered"}
    silent = [k for k in range(facts.clients) if k not in answered]
    if facts.rounds and silent:
        yield f"What these clients hold was never learned from, since no reply of theirs was used: {_list(silent)}."
    if facts.partition.get("test_note"):
        note = str(facts.partition["test_note"])
        yield f"{note[0].upper()}{note[1:]}."
    if facts.partition.get("dropped"):
        note = f": {facts.partition['note']}" if facts.partition.get("note") else ""
        yield f"{facts.partition['dropped']} examples are on no client{note}."


def _exactness(facts: Facts) -> Iterator[str]:
    errors = [e for record in facts.rounds if (e := number(record.get("aggregation_error"))) is not None]
    if errors and max(errors) > LARGE_ERROR:
        yield (
            f"What the server sends out differs from the weighted mean of the clients' changes by up to "
            f"{100 * max(errors):.0f}% of that mean's size (aggregation error). A server optimiser or a robust rule "
            "departs from the mean on purpose; a rule that averages the factors A and B does not reach the mean of "
            "their products, which rules that claim “exact” do: see fedlora strategies."
        )
    error = number(facts.result.get("relative_error")) or 0.0
    if error > APPROXIMATE:
        yield (
            f"adapter/ is an approximation of the trained model, off by {100 * error:.1f}% of the change "
            "(adapter.export_rank); fedlora export RUN OUT --format merged is exact."
        )


def _privacy(facts: Facts) -> Iterator[str]:
    claim = facts.result.get("privacy") or {}
    epsilon = number(claim.get("epsilon"))
    if claim and epsilon is None:
        yield "No epsilon can be stated for this run: see Privacy."
    elif epsilon is not None and epsilon >= WEAK_EPSILON:
        yield f"Epsilon {epsilon:.3g} is a weak promise: values of 1 to 8 are common."
    spent = sorted({k for record in facts.rounds for k in record.get("spent") or ()})
    if spent:
        yield f"The privacy budget of these clients is spent, and they are not asked any more: {_list(spent)}."


def _traces(facts: Facts) -> Iterator[str]:
    if facts.changes:
        yield f"Its config was changed on the way: {_list(facts.changes)}."
    if str(facts.environment.get("commit") or "").endswith("+changes"):
        yield "The code had changes that no commit holds: the exact code of this run is not on record."
    now = {name: facts.environment.get(name) for name in ("fedlora", "python", "packages", "processor", "device")}
    for resumed in facts.environment.get("resumed") or ():
        if any(name in resumed and now[name] is not None and resumed[name] != now[name] for name in now):
            yield (
                f"It went on after round {resumed.get('round')} with other versions or on another machine: "
                "its bytes need not be those of an uninterrupted run."
            )


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _rounds(numbers: list[int], *, upper: bool = True) -> str:
    word = ("Round" if upper else "round") + "s" * (len(numbers) != 1)
    return f"{word} {_list(numbers)}"


def _list(items: Iterable[object], most: int = 8) -> str:
    words = [str(item) for item in items]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
