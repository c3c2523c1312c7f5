"""What "auto" makes of model.dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretend_gpu import pretend_gpu

from fedlora.config import RunConfig, parse_config, settle
from fedlora.flower.app_config import by_itself
from fedlora.model import dtype as module
from fedlora.model.dtype import choose_dtype, slowdown, warning_of


def wide(folder: Path, width: int = 384) -> str:
    from transformers import BertConfig

    BertConfig(hidden_size=width).save_pretrained(folder)
    return str(folder)


def config_of(model: str, dtype: str = "auto", device: str = "cpu") -> RunConfig:
    return parse_config("", [f"model.name='{model}'", f"model.dtype={dtype}", f"runtime.device={device}"])


def measured(monkeypatch: pytest.MonkeyPatch, times: float) -> list[tuple[str, int]]:
    asked = []

    def found(dtype: str, width: int) -> dict[str, object]:
        asked.append((dtype, width))
        return {"times": times, "least": times * 0.9, "most": times * 1.1, "measured": "2026-01-01 00:00"}

    monkeypatch.setattr(module, "slowdown", found)
    return asked


@pytest.mark.parametrize(
    ("times", "chosen"), [(14.0, "float32"), (1.0, "float32"), (0.8, "float32"), (0.5, "bfloat16")]
)
def test_on_a_cpu_a_measurement_decides(
    times: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, times)
    assert choose_dtype(config_of(wide(tmp_path))) == getattr(torch, chosen)
    assert asked == [("bfloat16", 384)]


def test_a_small_model_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, 0.1)
    assert choose_dtype(config_of(wide(tmp_path, 64))) == torch.float32
    assert not asked


@pytest.mark.parametrize("named", ["float32", "bfloat16", "float16", "float64"])
def test_what_the_config_names_is_taken(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.1)
    assert choose_dtype(config_of(wide(tmp_path), named)) == getattr(torch, named)


def test_a_gpu_computes_in_bfloat16_if_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu():
        assert choose_dtype(config_of("none", device="cuda")) == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        assert choose_dtype(config_of("none", device="cuda")) == torch.float32
    with pretend_gpu("mps"):
        assert choose_dtype(config_of("none", device="mps")) == torch.float32


def test_a_slow_dtype_gets_a_line_with_the_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(tmp_path)
    measured(monkeypatch, 14.2)
    said = warning_of(config_of(model, "bfloat16"))
    assert said is not None
    assert "takes 14.2 times" in said
    assert "model.dtype = 'auto'" in said
    assert all(warning_of(config_of(model, named)) is None for named in ("auto", "float32", "float64"))
    measured(monkeypatch, 1.2)
    assert warning_of(config_of(model, "bfloat16")) is None


def test_a_wide_model_is_measured_at_a_width_that_takes_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def once(_kind: str, what: dict[str, Any], _measure: object, *, anew: bool) -> dict[str, object]:
        asked.append(what["width"])
        return {"times": 40.0, "least": 39.0, "most": 41.0, "measured": "2026-01-01 00:00"}

    monkeypatch.setattr(module, "once", once)
    said = warning_of(config_of(wide(tmp_path, 4092), "bfloat16"))
    assert said is not None
    assert "at least 40 times" in said
    assert asked == [1024]


def test_the_same_dtype_is_as_fast_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "once", lambda _kind, _what, measure, *, anew: measure())
    found = slowdown("float32", 64)
    assert found["least"] <= found["times"] <= found["most"]


def test_a_run_keeps_its_choice_and_nodes_share_one(tmp_path: Path) -> None:
    config = config_of("none")
    assert settle(config, {"dtype": "bfloat16"}).model.dtype == "bfloat16"
    assert settle(config_of("none", "float16"), {"dtype": "bfloat16"}).model.dtype == "float16"
    assert by_itself(config).model.dtype == "float32"
