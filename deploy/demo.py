"""A federation of three sites on this machine, as in production: `make deploy-demo`.

The coordinator has no data. Each site trains on a file of its own, keeps a test and a validation part of it apart, and
answers what its policy allows: the policy of site-c forbids the run, which goes on without it. An app that the
coordinator might send tries what it can get at site-c. site-b is killed in mid-round and comes back. The sites' own
validation figures end the run early, and its best round is kept. A second run is private: two sites put back older
ledgers, and both are found; so is an edited line of an audit log.

Afterwards everything is looked at from one place, as nobody could in production: the federated figures must be those of
the same adapter on all held-out rows in one file, and the run, simulated with the clients that answered in each round,
must end with the same bytes.

python deploy/demo.py [FOLDER]
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostile_app import DEMANDS, attack, separate_users
from local_federation import (
    FEDLORA,
    bury,
    command_line,
    end,
    failed_run,
    flower,
    free_ports,
    kill,
    listens,
    members,
    processes,
    records,
    say,
    say_command,
    start,
    wait_until,
)

SITES = ("site-a", "site-b", "site-c")
A, B, C = SITES
CONFIG = Path(__file__).with_name("demo.toml").read_text(encoding="utf-8")
ROUNDS: int = tomllib.loads(CONFIG)["rounds"]
PRIVATE = (
    "name=private evaluation.on=off selection= data.validation_fraction= data.test_fraction= train.steps=4 "
    "server.weighting=uniform privacy.noise_multiplier=1.0 privacy.delta=1e-3 privacy.max_grad_norm=1.0 "
    "privacy.public_examples=100"
)
"""What the second run has of its own: noise at the sites, and no figures of their examples."""

faults: list[str] = []


def main() -> int:
    """Run the demo; the exit status is 0 only if everything was as it must be."""
    folder = make_folder(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/deploy-demo").resolve())
    project = folder / "federation"
    run = project / "coordinator" / "runs" / "demo"
    config = write_data(folder)
    init(project, config)
    alone = separate_users(project / "nodes" / C, folder / "data" / f"{C}.jsonl")
    with running(project) as nodes:
        flower(project, "run", f"{project}/coordinator/app", "federation")
        try_hostile_app(project, folder / "data" / f"{C}.jsonl", alone)
        kill_and_bring_back(project, run, nodes)
        wait_until(lambda: finished(project, run), "the run to end")
        tell_outcome(run)
        put_ledgers_back(project, nodes)
        edit_audit_log(project / "nodes" / C / "site")
    evaluate_in_one_place(folder, config, run)
    simulate(folder, config, run)
    say(f"{len(faults)} faults: {'; '.join(faults)}" if faults else "all of it is as it must be")
    return 1 if faults else 0


def must(holds: bool, what: str) -> None:
    """Say what holds, or that it does not."""
    say(what if holds else f"FAULT: not so: {what}")
    if not holds:
        faults.append(what)


# ---------------------------------------------------------------------------------------------- before the run


def make_folder(folder: Path) -> Path:
    """An empty folder for everything, which may be an earlier demo's."""
    if folder.exists() and not (folder / "demo").is_file():
        raise SystemExit(f"error: {folder} is in the way: give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "demo").touch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say(f"all files and everybody's log: {folder}, from where paths begin below")
    return folder


def write_data(folder: Path) -> Path:
    """The base model, the sites' files (each has few kinds of digits), and all of them in one, to simulate."""
    from fedlora.assets import fetch

    pictures, model = fetch("digits", report=say), fetch("digits-vit", report=say)
    shutil.copytree(model, folder / "models" / "digits-vit")
    files: dict[str, list[str]] = {site: [] for site in SITES}
    for number, line in enumerate(pictures.read_text(encoding="utf-8").splitlines()[::8]):
        row = json.loads(line)
        # Site k holds the digits 3 k to 3 k + 3: neighbours share one kind.
        homes = [site for k, site in enumerate(SITES) if 3 * k <= int(row["label"]) <= 3 * k + 3]
        site = homes[number % len(homes)]
        files[site].append(json.dumps({**row, "site": site}) + "\n")
    (folder / "data").mkdir()
    for name, lines in {**files, "all": [line for site in SITES for line in files[site]]}.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    say(
        "pictures of digits: "
        + ", ".join(f"{len(lines)} at {site}" for site, lines in files.items())
        + "; none at the coordinator"
    )
    config = folder / "demo.toml"
    config.write_text(CONFIG.replace("FOLDER", str(folder)), encoding="utf-8")
    return config


def init(project: Path, config: Path) -> None:
    """`fedlora deploy init` for one machine (no proxy, everything on loopback), and the policy of site-c."""
    command = [*FEDLORA, "deploy", "init", str(project), str(config)]
    command += ["--host", "127.0.0.1", "--control-port", str(free_ports(1 + len(SITES)))]
    for site in SITES:
        command += ["--node", site, "--data", f"{site}={config.parent}/data/{site}.jsonl"]
        command += ["--ledger", f"{site}={project}/nodes/{site}/site/state/ledger.jsonl"]
    say_command(project, "fedlora", *command[3:])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    policy = project / "nodes" / C / "site" / "policy.toml"
    policy.write_text(f"max_rounds = {ROUNDS - 1}\n{policy.read_text()}")
    say(f"{C} writes into its policy.toml: max_rounds = {ROUNDS - 1}; the run has {ROUNDS}")


@contextmanager
def running(project: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Coordinator and nodes, whose keys are let in; all that is put into the dict ends with them."""
    nodes = {"coordinator": start(project, project.parent / "coordinator.log")}
    try:
        wait_until(lambda: listens(project), "the SuperLink")
        for site in SITES:
            key = f"{project}/coordinator/nodes/{site}.pub"
            flower(project, "supernode", "register", key, "federation", "--name", site)
            nodes[site] = start(project / "nodes" / site, project.parent / f"{site}.log")
        yield nodes
    finally:
        end(list(nodes.values()))


# ---------------------------------------------------------------------------------------------- while it runs


def try_hostile_app(project: Path, data: Path, alone: str) -> None:
    """What an app in the SuperExec's place reads at site-c, and what the worker says to what it asks."""
    node = project / "nodes" / C
    files = [data, node / "site" / "policy.toml", node / "site" / "audit.jsonl", node / "supernode" / "node.key"]
    own = node / "superexec" / "superexec.secret"
    found = attack(node, project / "coordinator" / "app" / "run.toml", [] if alone else [*files, own])
    say(f"an app of a hostile coordinator takes the SuperExec's place at {C}:")
    if alone:
        say(f"  left out: which files it can read, since one user runs all programs here ({alone})")
    else:
        must(
            all(found[file.name] == "Permission denied" for file in files) and found[own.name].endswith("bytes"),
            f"  of {', '.join(file.name for file in files)} it reads nothing, of its own {own.name} {found[own.name]}",
        )
    must(
        all(found[key].endswith(f"does not allow it: {clause}") for key, clause in DEMANDS.items()),
        "  the worker refuses by the policy: " + ", ".join(f"{key} ({clause})" for key, clause in DEMANDS.items()),
    )


def kill_and_bring_back(project: Path, run: Path, nodes: dict[str, subprocess.Popen[bytes]]) -> None:
    """SIGKILL to everything of site-b in round 2, while it trains; start it again as an admin would."""
    node = project / "nodes" / B
    wait_until(lambda: tell(run) >= 2 and trains(node), f"{B} to train in round 2")
    group = members(nodes[B].pid)
    kill(group)
    bury(nodes[B])
    say(f"{B} is killed in round {len(records(run))} (SIGKILL, {len(group)} processes)")
    nodes[B] = start(node, project.parent / f"{B}.log")


def trains(node: Path) -> bool:
    """Whether a process of the node's app runs."""
    return any(str(node) in line and "flwr-clientapp" in line for line in map(command_line, processes()))


_told: set[str] = set()


def tell(run: Path) -> int:
    """Say the rounds that have not been said yet; how many there are, with the evaluation before training."""
    lines = records(run)
    for record in lines:
        line = f"{run.name}, round {record['round']}: {in_words(record)}"
        if line not in _told:
            _told.add(line)
            say(line)
    return len(lines)


def in_words(record: Mapping[str, Any]) -> str:
    """A line of metrics: the figures, who answered, and who did not."""
    parts = []
    if clients := record.get("federated", {}).get("clients"):
        sizes = {SITES[int(k)]: f"{row['examples']:.0f}" for k, row in clients.items()}
        parts.append(
            f"accuracy {record['accuracy']:.1%} on the {' + '.join(sizes.values())} examples kept apart by "
            f"{' and '.join(sizes)}"
        )
        parts.append(f"loss for the selection {record['validation']['loss']:.3f}")
    elif "federated" in record:
        parts.append("nobody reports a figure")
    if "answered" in record:
        parts.append(f"{' and '.join(SITES[k] for k in record['answered'])} trained")
    parts += [f"epsilon {record['epsilon']:.2f}"] if "epsilon" in record else []
    parts += [f"{SITES[int(k)]} left out: {_short(why)}" for k, why in record.get("refused", {}).items()]
    parts += [f"no reply of {SITES[k]}" for k in record.get("missing", ())]
    parts += [f"{name.split(' ')[0]} left out: {_short(why)}" for name, why in record.get("turned_away", {}).items()]
    return "; ".join(parts)


def _short(why: str) -> str:
    return why.partition(" — ")[0].partition("; ")[0]


_next_look = 0.0


def finished(project: Path, run: Path, rounds: int = 0) -> bool:
    """Whether a run has its result, of so many rounds; tells each round once, and ends the demo if the run failed."""
    global _next_look
    tell(run)
    if (run / "result.json").is_file() and json.loads((run / "result.json").read_text())["rounds"] >= rounds:
        return True
    if time.monotonic() > _next_look:
        _next_look = time.monotonic() + 60.0
        if why := failed_run(project):
            raise SystemExit(f"error: the run is {why}: flwr log, and {project.parent}/coordinator.log")
    return False


# ---------------------------------------------------------------------------------------------- after it


def tell_outcome(run: Path) -> None:
    """Which round was kept, why the run ended, and where its report is."""
    result, last = json.loads((run / "result.json").read_text()), records(run)[-1]["round"]
    must(
        result["stopped"] is not None and last < ROUNDS,
        f"the run ends after round {last} of {ROUNDS}: {result['stopped']}",
    )
    kept = result["kept_round"]
    must(
        kept == result["best"]["round"] < last, f"adapter/ is that of round {kept}, adapter-last/ that of round {last}"
    )
    away = {name.split(" ")[0]: why for r in records(run) for name, why in r.get("turned_away", {}).items()}
    must("max_rounds" in away.get(C, ""), f"{C} took no part in any round: {away.get(C)}")
    say_path("its report", run / "report.html")


def say_path(what: str, path: Path) -> None:
    """A file, by its name in the demo's folder."""
    say(f"{what}: {'/'.join(path.parts[-5:])}")


def put_ledgers_back(project: Path, nodes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """A private run, whose ledgers two sites put back as they were a round ago; the run goes on, and finds both."""
    run = project / "coordinator" / "runs" / "private"
    app = ("run", f"{project}/coordinator/app", "federation", "--run-config")
    flower(project, *app, f'set="{PRIVATE} rounds=2"')
    wait_until(lambda: tell(run) >= 2, "the first private round")
    sites = {site: project / "nodes" / site / "site" for site in (A, B)}
    ledgers, log = {site: path / "state" / "ledger.jsonl" for site, path in sites.items()}, sites[B] / "audit.jsonl"
    older = {path: path.read_bytes() for path in (*ledgers.values(), log)}
    wait_until(lambda: finished(project, run, 2), "the private run to end")
    say(json.loads((run / "result.json").read_text())["privacy"]["statement"])
    say(
        f"{A} puts its ledger back as it was after round 1, {B} its ledger and its audit log; then a third round begins"
    )
    kill([pid for pid in members(nodes[B].pid) if " worker --socket" in command_line(pid)])  # it knows the log's head
    for path, content in older.items():
        path.write_bytes(content)
    flower(project, *app, f'resume=true set="{PRIVATE} rounds=3"')
    wait_until(lambda: finished(project, run, 3), "the third private round")
    last = records(run)[-1]
    reasons = (*last.get("turned_away", {}).values(), *last.get("refused", {}).values())
    found = sum("was rolled back or changed" in why for why in reasons)
    itself = {site: b"ledger_not_usable" in (path / "audit.jsonl").read_bytes() for site, path in sites.items()}
    must(
        last["answered"] == [2] and found == 2 and itself == {A: True, B: False},
        f"{A}'s worker finds it by its audit log, and the coordinator finds {B} by the head that it has kept",
    )


def edit_audit_log(site: Path) -> None:
    """`fedlora node log --verify` before and after somebody has changed a figure in a line."""
    log = site / "audit.jsonl"
    verified = _verify(site)
    must(verified.returncode == 0, f"$ fedlora node log {C}/site --verify: {verified.stdout.strip()}")
    lines = log.read_text().splitlines(keepends=True)
    place = next(k for k, line in enumerate(lines) if '"refused":"max_rounds"' in line)
    lines[place] = lines[place].replace('"refused":"max_rounds"', '"refused":"max_rank"')
    log.write_text("".join(lines))
    verified = _verify(site)
    must(
        verified.returncode == 1 and f"line {place + 1} " in verified.stderr,
        f"with one word of line {place + 1} changed: {_short(verified.stderr.strip().replace(str(site.parent), C))}",
    )


def _verify(site: Path) -> subprocess.CompletedProcess[str]:
    command = [*FEDLORA, "node", "log", str(site), "--verify"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------------------------------- from one place

COUNTED = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "mcc")
"""Figures of counts alone, which have no last digits that an order of additions could change."""


def evaluate_in_one_place(folder: Path, config: Path, run: Path) -> None:
    """The adapter on all rows that the sites kept apart, in one file, beside what the sites' sums gave."""
    result = json.loads((run / "result.json").read_text())
    clients, federated = result["last"]["federated"]["clients"], result["last"]["federated"]["figures"]
    file = folder / "data" / "held-out.jsonl"
    file.write_text("".join(held_out(folder, config, [int(k) for k in clients])), encoding="utf-8")
    command = [*FEDLORA, "evaluate", str(run), "--data", str(file), "--format", "csv"]
    say_command(run.parents[2], "fedlora", *command[3:])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    pooled = next(csv.DictReader(done.stdout.splitlines()))
    size = int(pooled["examples"])
    must(
        size == sum(row["examples"] for row in clients.values())
        and all(float(pooled[name]) == federated[name] for name in COUNTED)
        and all(abs(float(pooled[name]) - federated[name]) < 1e-3 for name in ("auroc", "ece", "loss")),
        f"the sites' sums and the {size} rows in one file give the same figures to the last count: "
        f"{round(federated['accuracy'] * size)} right, "
        + ", ".join(f"{name} {federated[name]:.4f}" for name in COUNTED[1:]),
    )
    for name in ("auroc", "ece", "loss"):
        say(f"  {name} {federated[name]:.6f} at the sites, {float(pooled[name]):.6f} in one place")


def held_out(folder: Path, config: Path, clients: list[int]) -> list[str]:
    """The rows that these clients keep apart for the test."""
    from fedlora.config import load_config
    from fedlora.data import load_data

    rows = (folder / "data" / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    apart = load_data(load_config(config)).apart["test"].clients
    return [rows[place] for client_id in clients for place in apart[client_id]]


def simulate(folder: Path, config: Path, deployed: Path) -> None:
    """The same run in one process, in whose rounds the clients answer that answered then."""
    rounds = records(deployed)[-1]["round"]
    command = [*FEDLORA, "run", str(config), "--set", f"output={folder}", "--set", "name=simulation"]
    command += ["--set", f"rounds={rounds}", "--replay", str(deployed), "--quiet"]
    say_command(deployed.parents[2], "fedlora", *command[3:])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    simulated = folder / "simulation"
    weights = [f"{which}/adapter_model.safetensors" for which in ("adapter", "adapter-last")]
    must(
        all((deployed / one).read_bytes() == (simulated / one).read_bytes() for one in weights),
        "deployed and simulated, both adapters are the same to the byte",
    )
    figures = [[(r["federated"]["figures"], r["validation"]) for r in records(run)] for run in (deployed, simulated)]
    must(figures[0] == figures[1], f"and all figures of all {rounds} rounds are the same")


if __name__ == "__main__":
    sys.exit(main())
