from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import raises

from fedlora.errors import FedloraError
from fedlora.report import plot_accuracy, plot_labels
from fedlora.report.figures import new_figure
from fedlora.report.line_charts import accuracy_curve, spread, widen


def make_records(rounds: int, domains: Sequence[str] = ("films", "phones")) -> list[dict[str, Any]]:
    return [
        {
            "round": number,
            "accuracy": 0.5 + 0.04 * number,
            "loss": 0.7 - 0.05 * number,
            "domains": {name: {"accuracy": 0.5 + 0.03 * number + 0.01 * k} for k, name in enumerate(domains)},
        }
        for number in range(rounds + 1)
    ]


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.slow
def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_accuracy(make_records(4), tmp_path / name)
        plot_labels(np.array([[3, 1], [0, 5]]), ["no", "yes"], tmp_path / f"labels-{name}", domains=["f", "p"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "labels-a.png").read_bytes() == (tmp_path / "labels-b.png").read_bytes()


@pytest.mark.slow
def test_other_figures_give_another_picture(tmp_path: Path) -> None:
    records = make_records(4)
    one = plot_accuracy(records, tmp_path / "a.png").read_bytes()
    records[2]["domains"]["films"]["accuracy"] = 0.9
    assert plot_accuracy(records, tmp_path / "b.png").read_bytes() != one
    one = plot_labels(np.array([[3, 1]]), ["no", "yes"], tmp_path / "c.png").read_bytes()
    assert plot_labels(np.array([[3, 2]]), ["no", "yes"], tmp_path / "d.png").read_bytes() != one


def test_the_files_hold_neither_date_nor_program(tmp_path: Path) -> None:
    data = plot_accuracy(make_records(2), tmp_path / "a.png").read_bytes()
    assert b"tEXt" not in data
    assert b"tIME" not in data


@pytest.mark.slow
@pytest.mark.parametrize(
    "records",
    [
        make_records(0),
        make_records(3, domains=()),
        make_records(3, domains=[f"site {k}" for k in range(12)]),
        make_records(60),
        [*make_records(2), {"round": 3, "train_loss": 0.1}],  # a round that was not evaluated
        make_records(3)[1:],
        [{"round": 0, "perplexity": 9.0, "loss": 2.2}, {"round": 1, "perplexity": 4.0, "loss": 1.4}],
    ],
)
def test_any_run_can_be_drawn(records: list[dict[str, Any]], tmp_path: Path) -> None:
    width, height = size_of(plot_accuracy(records, tmp_path / "new" / "a.png"))
    assert width == 1140
    assert 500 < height < 800


def test_a_run_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    for records in ([], [{"round": 1, "train_loss": 0.1}]):
        with raises(FedloraError, "nothing-to-draw", "accuracy"):
            plot_accuracy(records, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("clients", "labels"), [(1, 1), (8, 2), (200, 3), (10, 40), (3, 7), (3, 8)])
@pytest.mark.slow
def test_any_partition_can_be_drawn(clients: int, labels: int, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (clients, labels))
    path = plot_labels(counts, [f"label {k}" for k in range(labels)], tmp_path / "a.png")
    assert max(size_of(path)) <= 1350


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with raises(FedloraError, "names-do-not-fit", "1 label names"):
        plot_labels(np.ones((2, 2)), ["no"], tmp_path / "a.png")
    with raises(FedloraError, "names-do-not-fit", "1 domains", "2 clients"):
        plot_labels(np.ones((2, 2)), ["no", "yes"], tmp_path / "a.png", domains=["x"])
    with raises(FedloraError, "names-do-not-fit", "(0, 2)"):
        plot_labels(np.ones((0, 2)), ["no", "yes"], tmp_path / "a.png")


heights = st.lists(st.floats(-1e3, 1e3), max_size=12)


@given(heights, st.floats(0.01, 10))
def test_labels_keep_their_order_and_distance(values: list[float], gap: float) -> None:
    places = spread(values, gap)
    order = sorted(range(len(values)), key=lambda k: values[k])
    for lower, upper in pairwise(order):
        assert places[upper] - places[lower] >= gap * (1 - 1e-9) - 1e-9
    assert sum(places) == pytest.approx(sum(values), abs=1e-6)  # no drift up or down


@given(heights)
def test_labels_with_room_stay_where_they_are(values: list[float]) -> None:
    apart = [100.0 * k + value / 1e3 for k, value in enumerate(values)]
    assert spread(apart, 1.0) == pytest.approx(apart)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [2, 20])
def test_many_clients_have_a_picture_that_shows_them(tmp_path: Path, labels: int) -> None:
    draw = np.random.default_rng(0)
    counts = np.stack([draw.multinomial(10 + 5 * k, draw.dirichlet([0.2] * labels)) for k in range(150)])
    names = [f"label {k}" for k in range(labels)]
    whole = plot_labels(counts, names, tmp_path / "a.png").read_bytes()
    assert size_of(tmp_path / "a.png") == (1140, 960)
    # Whose number is whose says nothing where none has a row.
    assert plot_labels(counts[draw.permutation(150)], names, tmp_path / "b.png").read_bytes() == whole
    assert plot_labels(counts[:, ::-1], names, tmp_path / "c.png").read_bytes() != whole


def test_the_picture_itself_says_which_rounds_are_measured_on_a_sample() -> None:
    records = make_records(3)

    def xlabel(before: str = "base model") -> str:
        return accuracy_curve(records, "accuracy", before).draw(8.0).axes[0].get_xlabel()

    assert xlabel() == "round (0: base model, 50.0%)"
    assert xlabel("starting adapter") == "round (0: starting adapter, 50.0%)"
    for record in records[1:3]:
        record["sample"] = 20
    assert xlabel() == "round (0: base model, 50.0%; between the ends on 20 test examples)"
    del records[0]
    assert xlabel() == "round (between the ends on 20 test examples)"


def test_three_percent_of_a_perplexity_do_not_look_like_a_collapse() -> None:
    _, axes = new_figure(760, 420)
    axes.plot([0, 1], [31.0, 30.07])
    widen(axes)
    low, high = axes.get_ylim()
    assert 0 <= low < 30.07 < 31.0 < high
    assert 0.93 / (high - low) <= 0.15


def test_no_tick_of_a_picture_is_a_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale's own labels are formulas, and a picture's text is shown as it is: a class may be called "$5"."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    shown: list[str] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        shown.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", kept)
    counts = np.full((200, 2), 2)
    counts[0] = 400
    plot_labels(counts, ["no", "yes"], tmp_path / "labels.png")
    assert "100" in shown
    assert not [text for text in shown if "mathdefault" in text]
