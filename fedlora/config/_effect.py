"""Keys that say something which another key's value leaves without effect: refused, so that nobody counts on them.

What depends on the model, the data or a rule is refused where these are known (`fedlora.model.peft_methods`,
`fedlora.data`, `fedlora.federation.checks`, the entries of the registries). Only values other than the defaults are
looked at, since a run's own config.toml writes every key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedlora.config._learning import NODES
from fedlora.config._privacy import ClientPrivacyConfig, ExamplePrivacyConfig

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedlora.config._run import RunConfig

BUDGET = ("steps", "epochs", "batch_size", "keep_optimizer")
"""Keys of `[train]` that a loop of one's own is told."""
AFL = "afl"
"""The rule to which what a client weighs otherwise is nothing; `server.weighting` still says whether nodes with
their own data tell their numbers of examples."""


def without_effect(config: RunConfig) -> Iterator[str]:
    """One clause for each key that changes nothing in this run."""
    yield from _train(config)
    yield from _data(config)
    yield from _server(config)
    yield from _evaluation(config)
    for key in ("fraction", "error_feedback"):
        if config.wire.up != "topk" and _changed(config.wire, key):
            yield f"wire.{key} applies to wire.up = 'topk': set that, or remove it"
    privacy, tracking, runtime = config.privacy, config.tracking, config.runtime
    if isinstance(privacy, ClientPrivacyConfig) and not privacy.adaptive_clipping:
        for key in ("quantile", "clip_lr"):
            if _changed(privacy, key):
                yield f"privacy.{key} applies to adaptive clipping: remove it, or set privacy.adaptive_clipping = true"
    if tracking is not None and tracking.name == "tensorboard" and _changed(tracking, "project"):
        yield "tracking.project has no effect on TensorBoard, which has no projects: remove it"
    if runtime.backend == "ray" and runtime.processes == 1:
        yield "runtime.backend = 'ray' needs more than one process: raise runtime.processes, or remove it"


def overruled(config: RunConfig) -> Iterator[str]:
    """Keys that another one overrules as its documentation says, which is no mistake and worth a line in a run."""
    if config.data.test is not None and config.evaluation.on == "server":
        for key in ("test_fraction", "group"):
            if _changed(config.data, key):
                yield f"data.{key} has no effect: data.test names the test set, and none is cut off"


def _train(config: RunConfig) -> Iterator[str]:
    train, profiles = config.train, config.clients.profiles
    yield from _loop(config)
    if train.momentum and train.optimizer != "sgd":
        yield "train.momentum applies to SGD, and AdamW has its own: remove it, or set train.optimizer = 'sgd'"
    theirs = [profile.steps or (None if profile.epochs else train.steps) for profile in profiles] or [train.steps]
    known = [steps for steps in theirs if steps is not None]
    if len(known) == len(theirs) and train.warmup_steps >= max(known):
        yield (
            f"train.warmup_steps = {train.warmup_steps} lasts for all {max(known)} steps of a round, so that train.lr "
            f"is never reached: lower it below {max(known)}, or raise the steps"
        )
    if train.warmup_rounds >= config.rounds:
        yield (
            f"train.warmup_rounds = {train.warmup_rounds:g} lasts for all {config.rounds} rounds, so that train.lr is "
            f"never reached: lower it below {config.rounds}"
        )
    if train.lr_end and train.schedule == "constant":
        yield "train.lr_end applies to a schedule that falls: set train.schedule = 'linear' or 'cosine', or remove it"
    if profiles and all(profile.steps or profile.epochs for profile in profiles):
        for key in ("steps", "epochs"):
            if _changed(train, key):
                yield f"train.{key} has no effect, since every entry of clients.profiles sets its own: remove it"
    if profiles and all(profile.batch_size for profile in profiles) and _changed(train, "batch_size"):
        yield "train.batch_size has no effect, since every entry of clients.profiles sets its own: remove it"


def _loop(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.loop is None:
        if train.options:
            yield "train.options are those of a loop of your own: set train.loop = 'my_module:train', or remove them"
        return
    for key in type(train).model_fields:
        if key not in ("loop", "options", *BUDGET) and _changed(train, key):
            yield f"train.{key} has no effect on train.loop, which has its own: remove it, or pass it in train.options"
    if config.runtime.cohort not in ("auto", 1):
        yield "runtime.cohort has no effect with train.loop, which trains one client at a time: remove it"


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.source == NODES:
        for key in ("subset", "train_split", "options"):
            if _changed(data, key):
                yield f"data.{key} applies to data that are divided here, and each node brings its own file: remove it"
    for role in ("text", "label"):
        if role in data.columns and _changed(data, role):
            yield f"data.{role} and data.columns.{role} both name the column of the {role}: remove one of them"


def _server(config: RunConfig) -> Iterator[str]:
    server = config.server
    if server.clients_per_round is not None and _changed(server, "fraction"):
        yield "server.fraction and server.clients_per_round both set how many clients are sampled: remove one of them"
    if isinstance(config.privacy, ExamplePrivacyConfig) and _changed(server, "max_examples"):
        yield "server.max_examples has no effect in a private run, where no client tells its number: remove it"
    if _changed(server, "max_weight_ratio"):
        if server.weighting == "uniform":
            yield "server.max_weight_ratio has no effect with server.weighting = 'uniform': remove it"
        elif config.data.source != NODES:
            yield "server.max_weight_ratio applies to nodes that bring their own data: remove it"
        elif AFL in _rules(config):
            yield f"server.max_weight_ratio has no effect with {AFL!r}, which sets the weights itself: remove it"
    secret = config.data.source == NODES or config.privacy is not None
    if AFL in _rules(config) and not secret and _changed(server, "weighting"):
        yield f"server.weighting has no effect with {AFL!r}, which sets the weights itself: remove it"


def _rules(config: RunConfig) -> Iterator[str]:
    """The names of the rule and of those inside it."""
    found: Any = config.strategy.model_dump()
    while isinstance(found, Mapping):
        yield str(found.get("name"))
        found = found.get("inner")
    if isinstance(found, str):
        yield found


def _evaluation(config: RunConfig) -> Iterator[str]:
    evaluation = config.evaluation
    for key in ("clients_fraction", "min_examples"):
        if _changed(evaluation, key) and not evaluation.at_clients:
            yield f"evaluation.{key} applies to evaluation at the clients: set evaluation.on = 'clients', or remove it"
    if _changed(evaluation, "sample") and not evaluation.at_server:
        yield "evaluation.sample applies to the server's test set: set evaluation.on = 'server', or remove it"
    for key in ("every", "metric"):
        if evaluation.on == "off" and _changed(evaluation, key):
            yield f"evaluation.{key} has no effect with evaluation.on = 'off': remove it"
    if evaluation.on == "clients" and config.data.test is not None:
        yield "data.test has no effect with evaluation.on = 'clients', where clients test: remove it, or set 'both'"
    if config.selection is None and _changed(config.data, "validation_fraction"):
        yield "data.validation_fraction has no effect without a table [selection]: add one, or remove it"


def _changed(section: BaseModel, key: str) -> bool:
    return bool(getattr(section, key) != type(section).model_fields[key].default)
