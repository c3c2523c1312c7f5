"""`fedlora chat`: what it says is what plain transformers and PEFT say, turn by turn."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import invoke
from support.errors import raises
from support.federations import simulate
from support.tiny_federations import MakeConfig
from typer.testing import Result

from fedlora.errors import ConfigError, ModelError
from fedlora.evaluation.chat import Sampling, _printable, open_chats
from fedlora.evaluation.pretrained_adapter import find_adapter


@pytest.fixture
def run(tiny_config: MakeConfig, tasks: dict[str, list[str]]) -> Path:
    return simulate(tiny_config(*tasks["causal-lm"], "rounds=1", "train.lr=0.1", "train.steps=8")).rundir.path


def chat(*words: object, said: str = "") -> Result:
    return invoke("chat", *words, said=said)


def plainly(folder: Path, llama: Path, turns: list[tuple[str, str]], said: str, new_tokens: int) -> str:
    """By transformers and PEFT alone; without a folder the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    if folder != llama:
        model = PeftModel.from_pretrained(model, str(folder))
    text = "".join(f"you : {question} <end> me : {answer} <end> " for question, answer in turns)
    ids = tokenizer(f"{text}you : {said} <end> me : ", add_special_tokens=False, return_tensors="pt").input_ids
    grown = model.eval().generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(grown[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_it_says_what_plain_peft_says_and_remembers(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--temperature", 0, "--max-new-tokens", 5)
    for place in (run, run / "adapter"):
        found = chat(place, *options, said="red\n\ncat\n")
        assert found.exit_code == 0, found.output
        first, second = found.stdout.splitlines()
        assert first.strip() == plainly(run / "adapter", tiny_llama, [], "red", 5)
        assert second.strip() == plainly(run / "adapter", tiny_llama, [("red", first.strip())], "cat", 5)
    told = chat(run, *options, "--compare", said="red").stdout.splitlines()
    assert told[0] == f"base: {plainly(tiny_llama, tiny_llama, [], 'red', 5)}"
    assert told[1] == f"tuned: {first.strip()}"
    assert plainly(tiny_llama, tiny_llama, [], "red", 5) != first.strip()


def test_draws_are_the_seeds(run: Path) -> None:
    def said(*options: object) -> str:
        return chat(run, "--max-new-tokens", 8, *options, said="red\nblue\n").stdout

    first = said("--temperature", 2.0)
    assert said("--temperature", 2.0) == first
    assert said("--temperature", 2.0, "--seed", 1) != first


def test_a_system_message_is_in_the_prompt_and_old_turns_make_way(run: Path) -> None:
    source = find_adapter(run)
    (one,) = open_chats(source, compare=False, system="old", sampling=Sampling(8, 0.0))
    ids, _ = one._prompt("cat")
    assert one.tokenizer.decode(ids[0].tolist()).split()[:3] == ["me", ":", "old"]
    for _ in range(12):  # of 64 positions
        one.answer("red", lambda _: None)
    assert 2 < len(one.messages) < 24
    with raises(ModelError, "text-too-long", "say it shorter"):
        one.answer("red " * 80, lambda _: None)


def test_ctrl_c_keeps_what_was_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = open_chats(find_adapter(run), compare=False, system=None, sampling=Sampling(8, 0.0))
    written: list[str] = []

    def stop(text: str) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(text)

    with pytest.raises(KeyboardInterrupt):  # what comes after the answer is the caller's
        one.answer("red", stop)
    monkeypatch.setattr(type(one.adapted.model), "generate", _interrupted)
    assert one.answer("red", written.append) == ""
    assert written[-1] == " [stopped]"
    assert not torch.is_inference_mode_enabled()


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_models_that_generate_nothing_are_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run = simulate(tiny_config("rounds=1")).rundir.path
    with raises(ConfigError, "generates-no-text", "causal-lm"):
        open_chats(find_adapter(run), compare=False, system=None, sampling=Sampling())
    found = chat(tmp_path, said="red")
    assert found.exit_code == 1
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


def test_a_terminal_gets_text_alone() -> None:
    assert _printable("a\x1b[2J\n b \n") == "a\ufffd[2J\n b \n"
    assert "".join(map(_printable, [" one", " ", "two\n"])) == " one two\n"


@pytest.mark.nightly
@pytest.mark.parametrize("ends", ["\x04", "\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_in_a_terminal_it_asks_and_leaves_cleanly(ends: str, run: Path) -> None:
    ours, theirs = pty.openpty()
    call = [
        sys.executable,
        "-m",
        "fedlora",
        "chat",
        str(run),
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        "--compare",
    ]
    process = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = ""
    try:
        shown += _until(ours, "> ")
        os.write(ours, b"red\n")
        shown += _until(ours, "> ")
        if ends == "\x03":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.write(ours, ends.encode())
        assert process.wait(60) == 0, shown
    finally:
        process.kill()
        os.close(ours)
    assert "base" in shown
    assert "tuned" in shown
    assert "Traceback" not in shown


def _until(terminal: int, wanted: str) -> str:
    shown, end = "", time.monotonic() + 300
    while not shown.endswith(wanted) and time.monotonic() < end:
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    assert shown.endswith(wanted), shown
    return shown
