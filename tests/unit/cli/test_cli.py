from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from support.command_line import PLAIN, invoke, succeeds
from support.peft_adapters import train_by_peft
from support.tiny import write_tiny_toml

import fedlora.flower
import fedlora.report
import fedlora.tracking
from fedlora import __version__
from fedlora.cli._common import open_console
from fedlora.runs.checkpoints import Checkpoints
from fedlora.runs.rundir import RunDir

HEAVY = ("torch", "transformers", "peft", "flwr", "opacus", "matplotlib", "datasets", "numpy", "pydantic")
Cli = Callable[..., Result]


@pytest.fixture
def cli() -> Cli:
    def call(*words: object) -> Result:
        return invoke(*words, env=PLAIN)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of a finished run; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    bert, csv = request.getfixturevalue("tiny_bert"), request.getfixturevalue("tiny_csv")
    path = write_tiny_toml(folder, bert, csv)
    succeeds("run", path)
    return folder


# ---------------------------------------------------------------------------------------------- without a run


def test_help_and_version_import_nothing_heavy() -> None:
    for words in (["--help"], ["run", "--help"], ["version"]):
        code = (
            "import sys; from fedlora.cli import app\n"
            f"app({words!r}, standalone_mode=False)\n"
            f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "loaded: []"


def test_python_m_fedlora_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "fedlora", "version"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == f"fedlora {__version__}"


def test_an_error_is_one_line_on_standard_error(cli: Cli, tiny_toml: Path) -> None:
    result = cli("run", tiny_toml.with_name("tny.toml"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error: .*tny\.toml'.*tiny\.toml'.*\n", result.stderr)


def test_debug_shows_the_traceback(cli: Cli) -> None:
    result = cli("run", "absent.toml", "--debug")
    assert type(result.exception).__name__ == "ConfigError"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "fedlora run CONFIG"),
        (["--resume", "absent"], "'absent'"),
        (["--resume", "x", "--overwrite"], "--overwrite"),
        (["CONFIG", "--set", "strategy.name=fedavgg"], "'fedavg'"),
        (["CONFIG", "--set", "strategy.mu=1"], "'mu'"),
        (["CONFIG", "--set", "partition.name=domian"], "'domain'"),
        (["CONFIG", "--set", "train.stesp=1"], "'train.stesp'"),
        (["CONFIG", "--set", "clients.ranks=[1, 2]"], "FedAvg"),
        (["CONFIG", "--set", "name=a/b"], "'a/b'"),
    ],
)
def test_a_mistake_is_said_and_leaves_nothing_behind(cli: Cli, tiny_toml: Path, words: list[str], message: str) -> None:
    result = cli("run", *[str(tiny_toml) if word == "CONFIG" else word for word in words])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((tiny_toml.parent / "runs").glob("*"))


def test_strategies_lists_every_rule_with_its_bytes(cli: Cli, tiny_toml: Path) -> None:
    from fedlora.aggregators import rules

    result = cli("strategies", tiny_toml, "--set", "adapter.rank=4")  # which RAVAN's four heads divide
    assert result.exit_code == 0, result.output
    for name, cls in rules.items():
        assert f"\n{name}\n" in result.stdout
        assert cls.paper.split(",")[0] in result.stdout
    assert len(re.findall(r"bytes: sends [\d.]+ \w+, receives [\d.]+ \w+", result.stdout)) == len(list(rules))
    assert "regularisation = 0.01" in result.stdout


def test_strategies_says_which_rules_cannot_serve_a_config(cli: Cli, tiny_toml: Path) -> None:
    result = cli("strategies", tiny_toml, "--set", "clients.ranks=[1, 2]")
    assert result.exit_code == 0, result.output
    assert "not with this config: FedAvg needs the same rank" in result.stdout
    assert "bytes: sends" in result.stdout


@pytest.mark.slow
def test_partition_adds_up(cli: Cli, tiny_toml: Path, tmp_path: Path) -> None:
    result = cli("partition", tiny_toml, "--picture", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^ *(\d+) +(films|phones) +(\d+) +(\d+) +(\d+) +([\d.]+) bits", result.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert all(int(size) == int(negative) + int(positive) for _, _, size, negative, positive, _ in rows)
    total = sum(int(row[2]) for row in rows)
    assert f"4 clients, {total} training examples" in result.stdout
    assert f"{240 - total} to test" in result.stdout
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_assets_lists_without_fetching(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    result = cli("assets", "--list")
    assert result.exit_code == 0, result.output
    assert re.search(r"^vader +corpus +2\.5 MB +no ", result.stdout, re.MULTILINE)
    assert not list(tmp_path.iterdir())
    wrong = cli("assets", "vadr")
    assert (wrong.exit_code, "'vadr'" in wrong.stderr, "'vader'" in wrong.stderr) == (1, True, True)
    assert [line.split()[0] for line in cli("assets", "--list", "vader").stdout.splitlines()] == ["name", "vader"]


# ---------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
@pytest.mark.charts
def test_a_run_shows_and_leaves_everything(cli: Cli, tiny_toml: Path) -> None:
    result = cli("run", tiny_toml)
    assert result.exit_code == 0, result.output
    run = RunDir.open(tiny_toml.parent / "runs" / "tiny")
    records = run.read_metrics()
    assert [record["round"] for record in records] == [0, 1, 2]
    lines = result.stdout.splitlines()
    assert lines.pop(0) == "the checkpoint has no head for this task: classifier is new"
    assert run.read_json("environment.json")["new_weights"] == [
        "the checkpoint has no head for this task: classifier is new"
    ]
    assert lines[0].startswith("tiny: fedavg")
    assert lines[1].split() == ["round", "accuracy", "films", "phones", "train", "loss", "traffic", "time"]
    for record, line in zip(records, lines[2:5], strict=True):
        assert line.split()[:2] == [str(record["round"]), f"{100 * record['accuracy']:.1f}%"]
    for name, record in (("base model", records[0]), ("federated, round 2", records[2])):
        figures = [record["accuracy"], *(record["domains"][domain]["accuracy"] for domain in ("films", "phones"))]
        assert re.search(name + "".join(rf" +{100 * value:.1f}%" for value in figures), result.stdout)
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    names = {path.name for path in run.path.iterdir()}
    assert names >= {"config.toml", "environment.json", "metrics.jsonl", "partition.json", "result.json", "adapter"}
    assert names >= {"accuracy.png", "labels.png", "checkpoints"}
    assert run.report.read_text().count("<path") > 10, "the report's charts are drawn"


def test_quiet_prints_the_table_alone(cli: Cli, tiny_toml: Path) -> None:
    result = cli("run", tiny_toml, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.split()[:2] == ["accuracy", "all"]
    assert "train loss" not in result.stdout


@pytest.mark.slow
def test_a_finished_run_is_kept_until_overwritten(cli: Cli, tiny_toml: Path) -> None:
    folder = tiny_toml.parent / "runs" / "tiny"
    assert cli("run", tiny_toml).exit_code == 0
    before = (folder / "metrics.jsonl").read_bytes()
    again = cli("run", tiny_toml)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    wrong = cli("run", tiny_toml, "--overwrite", "--set", "adapter.targets=['qery']")
    assert wrong.exit_code == 1
    assert (folder / "metrics.jsonl").read_bytes() == before  # a wrong config costs nobody an earlier run
    other = cli("run", tiny_toml, "--overwrite", "--set", "rounds=1")
    assert other.exit_code == 0, other.output
    assert len(RunDir.open(folder).read_metrics()) == 2


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if "seconds" not in key}
    return value


@pytest.mark.slow
@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_says_how_to_go_on_and_ends_as_if_it_had_not_been(
    cli: Cli, tiny_toml: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    save = Checkpoints.save

    def interrupted(self: Checkpoints, state: Any) -> Path:
        if state.round == at:  # the line of metrics is written and the checkpoint is not
            raise KeyboardInterrupt
        return save(self, state)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    broken = cli("run", tiny_toml)
    monkeypatch.undo()
    folder = tiny_toml.parent / "runs" / "tiny"
    assert broken.exit_code == 130
    assert broken.stderr == f"stopped; go on with: fedlora run --resume {folder}\n"
    assert "--resume" in cli("run", tiny_toml).stderr
    changed = cli("run", tiny_toml, "--resume", folder, "--set", "adapter.rank=4")
    assert changed.exit_code == 1
    assert "adapter.rank was 2 and is now 4" in changed.stderr

    resumed = cli("run", "--resume", folder)
    assert resumed.exit_code == 0, resumed.output
    whole = finished / "runs" / "tiny"
    records = [[without_seconds(record) for record in RunDir.open(path).read_metrics()] for path in (whole, folder)]
    assert records[0] == records[1]
    one, other = (path / "adapter" / "adapter_model.safetensors" for path in (whole, folder))
    assert one.read_bytes() == other.read_bytes()
    last = cli("run", "--resume", folder)
    assert last.exit_code == 0
    assert "is finished: nothing is left to train" in last.stdout


def test_ctrl_c_before_anything_was_kept(cli: Cli, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora.training.open_workspace", interrupted)
    result = cli("run", tiny_toml)
    assert (result.exit_code, result.stderr) == (130, "stopped; nothing was kept\n")


@pytest.mark.usefixtures("faults_are_fedloras")
def test_an_error_that_is_a_bug_is_not_hidden(cli: Cli, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setenv("FEDLORA_CACHE", str(tiny_toml.parent))
    monkeypatch.setattr("fedlora.simulation.run.run_simulation", broken)
    result = cli("run", tiny_toml)
    (log,) = (tiny_toml.parent / "errors").glob("*.log")
    assert "unexpected ZeroDivisionError" in result.stderr
    assert str(log) in result.stderr
    assert "Traceback" in log.read_text()
    assert isinstance(cli("run", tiny_toml, "--debug").exception, ZeroDivisionError)


@pytest.mark.slow
def test_baselines_have_their_rows(cli: Cli, tiny_toml: Path, finished: Path) -> None:
    shutil.copytree(finished / "runs", tiny_toml.parent / "runs")
    folder = tiny_toml.parent / "runs" / "tiny"
    result = cli("run", "--resume", folder, "--baselines", "--baseline-clients", 2)
    assert result.exit_code == 0, result.output
    assert "local-only: 2 of 4 clients: 0, 2" in result.stdout  # one of each domain
    found = json.loads((folder / "baselines.json").read_text())
    alone, together = found["local_only"], found["centralised"]
    assert [row["steps"] for row in alone["clients"]] == [4, 4]  # rounds x steps
    assert together["examples_seen"] == 4 * 2 * 2 * 8  # clients x rounds x steps x batch
    for name, row in (("best of 2 tried", alone["best"]), ("mean of 2 tried", alone["mean"])):
        assert re.search(rf"one client alone, {name} +{100 * row['accuracy']:.1f}%", result.stdout)
    assert re.search(rf"all data in one place +{100 * together['accuracy']:.1f}%", result.stdout)


@pytest.mark.slow
def test_a_run_with_an_adapter_says_what_it_began_with_and_needs_it_for_baselines(
    cli: Cli, tiny_toml: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, folder = tiny_toml.parent / "by-peft", tiny_toml.parent / "runs" / "tiny"
    train_by_peft(tiny_bert, start, r=2)
    drawn = []
    monkeypatch.setattr(fedlora.report, "plot_accuracy", lambda *_, before: drawn.append(before))
    result = cli("run", tiny_toml, "--set", f"adapter.start={start}", "--set", "rounds=1")
    assert result.exit_code == 0, result.output
    assert re.search(r"^starting adapter  ", result.stdout, re.MULTILINE)
    assert "base model" not in result.stdout
    assert drawn == ["starting adapter"]
    shutil.move(start, start.with_name("elsewhere"))
    longer = ("run", "--resume", folder, "--set", "rounds=2")
    result = cli(*longer, "--baselines")
    assert result.exit_code == 1
    assert "put it back, or resume without --baselines" in " ".join(result.stderr.split())
    assert len(RunDir.open(folder).read_metrics()) == 2, "nothing was trained before it was said"
    train_by_peft(tiny_bert, start, r=2, dtype=torch.float64)  # another one in its place
    result = cli(*longer, "--baselines")
    assert result.exit_code == 1
    assert "put it back, or resume without --baselines" in " ".join(result.stderr.split())
    assert cli(*longer).exit_code == 0
    assert len(RunDir.open(folder).read_metrics()) == 3
    shutil.rmtree(start)
    shutil.move(start.with_name("elsewhere"), start)
    result = cli("run", "--resume", folder, "--baselines", "--baseline-clients", 1)
    assert result.exit_code == 0, result.output


def test_an_exported_adapter_is_the_runs(cli: Cli, finished: Path, tmp_path: Path) -> None:
    result = cli("export", finished / "runs" / "tiny", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for path in (finished / "runs" / "tiny" / "adapter").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    again = cli("export", finished / "runs" / "tiny", tmp_path / "out")
    assert again.exit_code == 1
    assert str(tmp_path / "out") in again.stderr


def test_a_merged_export_answers_like_base_and_adapter(
    cli: Cli, finished: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = cli("export", finished / "runs" / "tiny", tmp_path / "out", "--format", "merged")
    assert result.exit_code == 0, result.output
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    adapted = PeftModel.from_pretrained(plain, finished / "runs" / "tiny" / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(
        ["a lovely film", "awful phone"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits)


def test_a_run_that_never_began_cannot_be_exported(cli: Cli, tiny_toml: Path, tmp_path: Path) -> None:
    from fedlora.config import load_config

    run = RunDir.create(load_config(tiny_toml))
    result = cli("export", run.path, tmp_path / "out")
    assert result.exit_code == 1
    assert f"--resume {run.path}" in result.stderr


# ---------------------------------------------------------------------------------------------- the report


def test_a_run_ends_by_naming_its_report(cli: Cli, tiny_toml: Path) -> None:
    done = cli("run", tiny_toml)
    path = tiny_toml.parent / "runs" / "tiny" / "report.html"
    assert done.stdout.splitlines()[-1] == f"report: {path}"
    assert "2 of 2" in path.read_text()


def test_the_report_can_be_written_again_and_holds_the_baselines(cli: Cli, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished / "runs" / "tiny", tmp_path / "tiny")
    before = (run / "report.html").read_text()
    assert "one client alone" not in before
    figures = {"accuracy": 0.25, "loss": 1.0, "domains": {}}
    alone = {"clients": [figures], "of": 1, "best": figures, "mean": figures, "worst": figures}
    (run / "baselines.json").write_text(json.dumps({"local_only": alone, "centralised": figures}))
    done = cli("report", run)
    assert done.stdout == f"report: {run / 'report.html'}\n"
    assert "one client alone, worst" in (run / "report.html").read_text()


def test_a_report_of_nothing_names_the_nearest_run(cli: Cli, finished: Path) -> None:
    done = cli("report", finished / "runs" / "tyni")
    assert done.exit_code == 1
    assert "runs/tiny'" in done.stderr


# ---------------------------------------------------------------------------------------------- config


@pytest.mark.slow
def test_config_explains_a_key_and_says_where_its_value_comes_from(cli: Cli, tiny_toml: Path) -> None:
    alone = cli("config", "train.lr").stdout
    assert "number, > 0" in alone
    assert "default: 0.001" in alone
    assert "here:" not in alone
    for words, here in (
        ((), f"here: 0.01 ({tiny_toml})"),
        (("--set", "train.lr=5"), "here: 5 (--set)"),
        (("--set", "train.steps=3"), f"here: 0.01 ({tiny_toml})"),
    ):
        assert here in " ".join(cli("config", tiny_toml, "train.lr", *words).stdout.split())
    assert "here: 0 (default)" in cli("config", tiny_toml, "seed").stdout


def test_config_lists_the_fields_of_what_the_file_chooses_alone(cli: Cli, tiny_toml: Path) -> None:
    everything = cli("config").stdout
    assert "partition.alpha (dirichlet)" in everything
    here = cli("config", tiny_toml).stdout
    assert "partition.alpha" not in here
    assert "partition.mixing" in here
    assert "privacy.delta" not in here
    other = cli("config", tiny_toml, "--set", "strategy.name=fair").stdout
    assert "strategy.solver" in other
    assert re.search(r"strategy\.name +\"fair\" +--set", other)


def test_config_says_where_a_dict_comes_from_of_which_a_key_was_set(cli: Cli, tiny_toml: Path) -> None:
    said = cli("config", tiny_toml, "adapter.rank_pattern", "--set", 'adapter.rank_pattern."a.b"=4').stdout
    assert "(--set)" in said
    assert "(--set)" not in cli("config", tiny_toml, "adapter.rank", "--set", "adapter.rank_pattern.a=4").stdout


def test_config_names_the_nearest_key_and_prints_the_schema(cli: Cli, tiny_toml: Path) -> None:
    assert "'train.lr'" in cli("config", "train.lrr").stderr
    assert "--set" in cli("config", "--set", "seed=1").stderr
    assert json.loads(cli("config", "--schema").stdout)["properties"]["rounds"]


# ---------------------------------------------------------------------------------------------- trackers


def test_a_run_tells_its_tracker_every_round(cli: Cli, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, float]] = []

    class Fake(fedlora.tracking.Tracker):
        package, where = "json", "nowhere"

        def __init__(self, config: Any, folder: Path, run_id: str | None) -> None: ...

        def log(self, figures: Any, step: int) -> None:
            logged.append((step, figures["accuracy"]))

        def close(self, *, ok: bool) -> None:
            logged.append((-1, float(ok)))

    monkeypatch.setattr(fedlora.tracking, "_class", lambda name: Fake)
    assert cli("run", tiny_toml, "--set", "tracking.name=wandb").exit_code == 0
    records = RunDir.open(tiny_toml.parent / "runs" / "tiny").read_metrics()
    assert logged == [*((record["round"], record["accuracy"]) for record in records), (-1, 1.0)]


def test_a_missing_tracker_is_said_before_anything_is_loaded(
    cli: Cli, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedlora.tracking, "find_spec", lambda package: None)
    done = cli("run", tiny_toml, "--set", "tracking.name=wandb", "--set", "model.name=not/there")
    assert done.exit_code == 1
    assert "pip install 'fedlora[wandb]'" in done.stderr
    assert not (tiny_toml.parent / "runs").exists()


def test_a_table_is_whole_where_no_terminal_cuts_it(tiny_toml: Path) -> None:
    names = [f"a site with quite a long name, in town number {k}, and with a branch in the next one" for k in range(2)]
    labels = [f"data.group_names.domain={{films='{names[0]}', phones='{names[1]}'}}"]
    natural = "partition={name='natural', column='domain'}"
    words = ["partition", str(tiny_toml), *(word for one in [*labels, natural] for word in ("--set", one))]
    result = succeeds(*words, env={"COLUMNS": None})
    assert all(name in result.stdout for name in names), result.stdout


@pytest.mark.parametrize("words", [("config", "CONFIG"), ("config", "train.lr", "task.class_weights"), ("assets",)])
def test_lines_in_a_pipe_have_no_blanks_at_their_ends(words: tuple[str, ...], cli: Cli, tiny_toml: Path) -> None:
    lines = cli(*(tiny_toml if word == "CONFIG" else word for word in words)).stdout.splitlines()
    assert len(lines) > 3
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_line_that_several_calls_print_keeps_its_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console()
    console.print("a   ", end="")
    console.print("b   ")
    console.print("c   \n\nd  ")
    assert capsys.readouterr().out == "a   b\nc\n\nd\n"
