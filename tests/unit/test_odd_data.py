"""Odd cells and files: what could be read in two ways is refused by its place, and white space is data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedlora.config import parse_config
from fedlora.data import load_data, read_file
from fedlora.data._sources import require_one_kind
from fedlora.errors import DataError
from fedlora.tasks._chat import encode_conversations, read_messages
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
    with pytest.raises(DataError, match=r"in row 1 and .* in row 2.*task\.labels"):
        class_names(["other", *pair], "label")
    with pytest.raises(DataError, match=r"in row 1 and .* in row 2"):
        class_names(["other", *reversed(pair)], "label")


def test_classes_that_differ_stay_apart_and_their_white_space_stays() -> None:
    assert class_names(["a", "A", "b ", "10", "1"], "label") == ("1", "10", "A", "a", "b ")
    assert class_names(["--5", "5"], "label") == ("--5", "5")
    assert class_ids(["1", "1.0"], "label", ("1", "1.0")).tolist() == [0, 1]  # named in the config: taken at its word


def test_a_place_is_never_taken_for_a_name_beside_it() -> None:
    assert class_ids([1, 0], "label", ("no", "yes")).tolist() == [1, 0]
    with pytest.raises(DataError, match="'1' is no class"):
        class_ids(["yes", "1"], "label", ("no", "yes"))
    with pytest.raises(DataError, match="'0' is no class"):  # 1 is the name of class 0, so 0 is not its place
        class_ids([1, 0], "label", ("1", "2"))
    with pytest.raises(DataError, match="did you mean 'yes', which is written in another way"):
        class_ids(["yes "], "label", ("no", "yes"))


@pytest.mark.parametrize("values", [[1, "1"], ["a", 1.5], [[1], [2]], [{"a": 1}], [True, 1]])
def test_domains_and_clients_of_several_kinds_are_not_joined(values: list[Any]) -> None:
    with pytest.raises(DataError, match="column 'site'"):
        require_one_kind(values, "site")


# ------------------------------------------------------------------------------------------------ text


def test_indentation_is_data(tiny_bert: Path) -> None:
    code = "    return x\n"
    assert require_text(code, 0, "text") == code
    conversation = read_messages([[code], ["\tyes\n"]], ["prompt", "answer"], None)
    assert [message["content"] for message in conversation[0]] == [code, "\tyes\n"]


def test_half_a_character_is_named_with_its_place() -> None:
    half = json.loads('"rose \\ud83d"')
    with pytest.raises(DataError, match=r"row 4, column 'text': character 5 .*U\+D83D"):
        require_text(half, 4, "text")
    with pytest.raises(DataError, match=r"row 0.*U\+D83D"):
        read_messages([[[{"role": "assistant", "content": half}]]], ["messages"], None)
    with pytest.raises(DataError, match=r"U\+D83D"):
        class_names(["a", half], "label")
    with pytest.raises(DataError, match=r"U\+D83D"):
        require_one_kind([half], "site")


# ------------------------------------------------------------------------------------------------ conversations

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    "extra", [{"tool_calls": [{"name": "f"}]}, {"name": "ann"}, {"reasoning_content": "since"}, {"weight": 0}]
)
def test_no_key_of_a_message_is_dropped(extra: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"row 1, column 'messages': message 1 has '{next(iter(extra))}'"):
        read_messages([[CHAT, [CHAT[0], CHAT[1] | extra]]], ["messages"], None)


def test_keys_that_hold_nothing_are_no_keys() -> None:
    """Tables of one schema have every key in every message."""
    filled = [message | {"name": None, "tool_calls": []} for message in CHAT]
    assert read_messages([[filled]], ["messages"], None) == [CHAT]


def test_a_template_that_refuses_names_the_row(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_bert))
    before = tokenizer.chat_template
    system = [{"role": "system", "content": "be kind"}, *CHAT]
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{{ m['role'] + m['content'] }}{% endfor %}"
        )
        with pytest.raises(DataError, match=r"row 1: .*system, user, assistant.*no system role.*task\.system"):
            list(encode_conversations(tokenizer, [CHAT, system], "answer", 64))
        tokenizer.chat_template = "{{ messages[0].nothing.of_it }}"
        with pytest.raises(DataError, match="row 0: the model's chat template"):
            list(encode_conversations(tokenizer, [CHAT], "answer", 64))
    finally:
        tokenizer.chat_template = before


def test_an_answer_to_nobody_is_refused_by_its_row(tiny_bert: Path) -> None:
    greeting = [{"role": "assistant", "content": "hello"}, *CHAT]
    with pytest.raises(DataError, match=r"row 1: .*begins with the assistant.*train_on"):
        list(encode_conversations(load_tokenizer(str(tiny_bert)), [CHAT, greeting], "answers", 64))


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
    with pytest.raises(DataError, match="0 to 65535"):
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
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n' * 10 + "{bad\n", "line 11"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ' + "[" * 100_000 + "\n", "line 3"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2: key 'text' stands twice"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', r"\.jsonl"),
        ("a.json", '[{"text": "a", "text": "b"}]', "stands twice"),
        ("a.json", "[" * 100_000, "recursion|cannot be read"),
        ("a.csv", "text;label\na;b\n", "';'"),
        ("a.csv", "text\tlabel\na\tb\n", "a tab"),
        ("a.tsv", "text,label\na,b\n", "a comma"),
        ("a.csv", 'text,label\na,b\nc,"d" e\n', "line 3"),
        ("a.csv", 'text,label\na,"b\nc,d\n', "line 3"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_damaged_file_says_where(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as caught:
        read_file(tmp_path / name)
    assert "\n" not in str(caught.value)


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

    def problem(source: str) -> str:
        with pytest.raises(DataError) as caught:
            load_data(parse_config(f"model.name='{tiny_bert}'\ndata.source='{source}'"))
        return str(caught.value)

    assert "-report" not in problem(f"{tmp_path}/nothing-like-it.csv")
    assert "is a folder" in problem(f"{tmp_path}/folder.csv")
    for name in (f"{tmp_path}/absent", "./absent", "~/absent/"):
        assert "there is no file or folder" in problem(name)


def test_parquet_gives_nested_values_and_refuses_a_name_that_stands_twice(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), path)
    assert read_messages([read_file(path).columns["messages"]], ["messages"], None) == [CHAT, CHAT]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match="the same name"):
        read_file(path)
