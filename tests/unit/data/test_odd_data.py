"""Odd cells and files: what could be read in two ways is refused by its place, and white space is data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.errors import raises

from fedlora.config import parse_config
from fedlora.data import load_data, read_file
from fedlora.data._sources import require_one_kind
from fedlora.errors import DataError
from fedlora.tasks._chat import encode_rows
from fedlora.tasks._chat_formats import read_rows
from fedlora.tasks._classification import class_ids, class_names
from fedlora.tasks._text import load_tokenizer, require_text
from fedlora.tasks.image_classification import read_picture

# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "pair",
    [
        ("1", "1.0"),
        ("1", "01"),
        ("1", "1e0"),
        ("-0", "0"),
        ("0.5", "0.50"),
        (1, "1"),
        (1, 1.0),
        (1, True),
        ("yes", " yes"),
        ("é", "e\u0301"),
    ],
)
def test_one_class_in_two_spellings_is_neither_joined_nor_made_two(pair: tuple[Any, Any]) -> None:
    with raises(DataError, "label-in-two-spellings", "in row 1", "in row 2", "task.labels"):
        class_names(["other", *pair], "label")
    with raises(DataError, "label-in-two-spellings", "in row 1", "in row 2"):
        class_names(["other", *reversed(pair)], "label")


def test_classes_that_differ_stay_apart_and_their_white_space_stays() -> None:
    assert class_names(["a", "A", "b ", "10", "1"], "label") == ("1", "10", "A", "a", "b ")
    assert class_names(["--5", "5"], "label") == ("--5", "5")
    assert class_ids(["1", "1.0"], "label", ("1", "1.0")).tolist() == [0, 1]  # named in the config: taken at its word


def test_a_place_is_never_taken_for_a_name_beside_it() -> None:
    assert class_ids([1, 0], "label", ("no", "yes")).tolist() == [1, 0]
    with raises(DataError, "label-not-a-class", "row 1", "'1'"):
        class_ids(["yes", "1"], "label", ("no", "yes"))
    with raises(DataError, "label-not-a-class", "row 1", "'0'"):  # 1 is the name of class 0, so 0 is not its place
        class_ids([1, 0], "label", ("1", "2"))
    with raises(DataError, "label-not-a-class", "'yes '", "'yes'"):
        class_ids(["yes "], "label", ("no", "yes"))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([1, "1"], "mixed-types"),
        (["a", 1.5], "mixed-types"),
        ([[1], [2]], "not-a-name"),
        ([{"a": 1}], "not-a-name"),
        ([True, 1], "mixed-types"),
    ],
)
def test_domains_and_clients_of_several_kinds_are_not_joined(values: list[Any], code: str) -> None:
    with raises(DataError, code, "row 0", "column 'site'"):
        require_one_kind(values, "site")


# ------------------------------------------------------------------------------------------------ text


def read(columns: dict[str, list[Any]]) -> list[Any]:
    return list(read_rows(columns, {role: role for role in columns}, None))


def test_indentation_is_data(tiny_bert: Path) -> None:
    code = "    return x\n"
    assert require_text(code, 0, "text") == code
    (conversation,) = read({"instruction": [code], "output": ["\tyes\n"]})
    assert [message["content"] for message in conversation.messages] == [code, "\tyes\n"]


def test_half_a_character_is_named_with_its_place() -> None:
    half = json.loads('"rose \\ud83d"')
    with raises(DataError, "lone-surrogate", "row 4, column 'text'", "character 5", "U+D83D"):
        require_text(half, 4, "text")
    with raises(DataError, "lone-surrogate", "row 0", "U+D83D"):
        read({"messages": [[{"role": "assistant", "content": half}]]})
    with raises(DataError, "lone-surrogate", "U+D83D"):
        class_names(["a", half], "label")
    with raises(DataError, "lone-surrogate", "U+D83D"):
        require_one_kind([half], "site")


# ------------------------------------------------------------------------------------------------ conversations

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def test_an_unknown_key_of_a_message_is_refused() -> None:
    with raises(DataError, "unknown-message-key", "row 1, column 'messages'", "message 1", "'mood'"):
        read({"messages": [CHAT, [CHAT[0], CHAT[1] | {"mood": "good"}]]})


def test_keys_that_hold_nothing_are_no_keys() -> None:
    """Tables of one schema have every key in every message."""
    filled = [message | {"name": None, "tool_calls": []} for message in CHAT]
    assert read({"messages": [filled]}) == read({"messages": [CHAT]})


def test_a_template_that_refuses_names_the_row(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_bert))
    before = tokenizer.chat_template
    system = [{"role": "system", "content": "be kind"}, *CHAT]
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{{ m['role'] + m['content'] }}{% endfor %}"
        )
        with raises(DataError, "template-refuses", "row 1", "system, user, assistant", "no system role", "task.system"):
            list(encode_rows(tokenizer, read({"messages": [CHAT, system]}), "answer", 64))
        tokenizer.chat_template = "{{ messages[0].nothing.of_it }}"
        with raises(DataError, "template-refuses", "row 0"):
            list(encode_rows(tokenizer, read({"messages": [CHAT]}), "answer", 64))
    finally:
        tokenizer.chat_template = before


def test_an_answer_to_nobody_is_refused_by_its_row(tiny_bert: Path) -> None:
    greeting = [{"role": "assistant", "content": "hello"}, *CHAT]
    with raises(DataError, "answer-without-prompt", "row 1", "task.train_on"):
        list(encode_rows(load_tokenizer(str(tiny_bert)), read({"messages": [CHAT, greeting]}), "answers", 64))


# ------------------------------------------------------------------------------------------------ pictures


def test_sixteen_bits_of_grey_are_not_clipped(tmp_path: Path) -> None:
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(
        read_picture(str(tmp_path / "deep.png"), 0, "image", 1)[..., 0], np.rint(grey / 257).astype(np.uint8)
    )
    Image.fromarray((grey / 65535).astype(np.float32)).save(tmp_path / "real.tiff")
    np.testing.assert_array_equal(
        read_picture(str(tmp_path / "real.tiff"), 0, "image", 1)[..., 0], np.rint(grey / 257).astype(np.uint8)
    )
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "deeper.tiff")
    with raises(DataError, "pixel-out-of-range", "row 0, column 'image'", "70000"):
        read_picture(str(tmp_path / "deeper.tiff"), 0, "image", 1)


@pytest.mark.parametrize("kind", ["phone.jpg", "palette.png", "alpha.png", "cmyk.jpg", "animated.gif", "grey.png"])
def test_a_stored_picture_is_what_datasets_makes_of_it(kind: str, tmp_path: Path) -> None:
    from datasets import Image as Feature

    draw = np.random.default_rng(0)
    colour = Image.fromarray(draw.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    path = tmp_path / kind
    exif = colour.getexif()
    exif[0x0112] = 6  # a camera that was held upright
    {
        "phone.jpg": lambda: colour.save(path, exif=exif),
        "palette.png": lambda: colour.quantize(8).save(path, transparency=0),
        "alpha.png": lambda: colour.convert("RGBA").save(path),
        "cmyk.jpg": lambda: colour.convert("CMYK").save(path),
        "animated.gif": lambda: colour.save(path, save_all=True, append_images=[colour.rotate(180)]),
        "grey.png": lambda: colour.convert("L").save(path),
    }[kind]()
    wanted = np.asarray(Feature(mode="RGB").decode_example({"path": str(path), "bytes": None}))
    for value in (str(path), path, {"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}):
        np.testing.assert_array_equal(read_picture(value, 0, "image", 3), wanted)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read_picture(opened, 0, "image", 3), wanted)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    """Pillow raises errors of many kinds; whatever it is, row and file are said."""
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    draw = np.random.default_rng(0)
    refused = []
    for _ in range(60):
        data = bytearray(whole[: draw.integers(1, len(whole) + 1)])
        for place in draw.integers(0, len(data), 3):
            data[place] = draw.integers(0, 256)
        (tmp_path / "b.png").write_bytes(data)
        try:
            read_picture(str(tmp_path / "b.png"), 3, "image", 3)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all("row 3, column 'image'" in line and "b.png" in line for line in refused)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "content", "code", "named"),
    [
        ("a.jsonl", '{"text": "a"}\n' * 10 + "{bad\n", "malformed-file", "line 11"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ' + "[" * 100_000 + "\n", "malformed-file", "line 3"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "malformed-file", "line 2: key 'text'"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "malformed-file", ".jsonl"),
        ("a.json", '[{"text": "a", "text": "b"}]', "malformed-file", "'text'"),
        ("a.json", "[" * 100_000, "malformed-file", ".json"),
        ("a.csv", "text;label\na;b\n", "malformed-file", "';'"),
        ("a.csv", "text\tlabel\na\tb\n", "malformed-file", "a tab"),
        ("a.tsv", "text,label\na,b\n", "malformed-file", "a comma"),
        ("a.csv", 'text,label\na,b\nc,"d" e\n', "malformed-file", "line 3"),
        ("a.csv", 'text,label\na,"b\nc,d\n', "malformed-file", "line 3"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "not-utf8", "UTF-8"),
    ],
)
def test_a_damaged_file_says_where(name: str, content: str | bytes, code: str, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with raises(DataError, code, name, named):
        read_file(tmp_path / name)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_line_ends_quotes_and_long_fields_are_read(line_end: str, mark: str, tmp_path: Path) -> None:
    text = 'a "quoted"\nfield of two lines, ' + "x" * 200_000
    quoted = text.replace('"', '""')
    (tmp_path / "a.csv").write_bytes(f'{mark}text,label{line_end}"{quoted}",b{line_end}'.encode())
    (tmp_path / "a.jsonl").write_bytes(f"{mark}{json.dumps({'text': text, 'label': 'b'})}{line_end}".encode())
    for name in ("a.csv", "a.jsonl"):
        assert dict(read_file(tmp_path / name).columns) == {"text": [text], "label": ["b"]}


def test_what_is_no_file_is_said_without_listing_the_folder(tiny_bert: Path, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}-report.csv").write_text("text,label\n")
    (tmp_path / "folder.csv").mkdir()

    def problem(source: str, code: str) -> str:
        with raises(DataError, code, source) as caught:
            load_data(parse_config(f"model.name='{tiny_bert}'\ndata.source='{source}'"))
        return str(caught.value)

    assert "-report" not in problem(f"{tmp_path}/nothing-like-it.csv", "no-such-file")
    problem(f"{tmp_path}/folder.csv", "not-a-file")
    for name in (f"{tmp_path}/absent", "./absent", "~/absent/"):
        problem(name, "no-such-file")


def test_parquet_gives_nested_values_and_refuses_a_name_that_stands_twice(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), path)
    assert read({"messages": read_file(path).columns["messages"]}) == read({"messages": [CHAT, CHAT]})
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with raises(DataError, "malformed-file", path, "'text'"):
        read_file(path)
