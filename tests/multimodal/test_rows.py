"""Which turn shows which image, in every format; rows that cannot be used, by reason."""

from __future__ import annotations

import base64

import pytest

from luthier.core.registry import find
from luthier.data.source import COLUMNS, TAGS, BadRow, Columns

NAMES = {**COLUMNS, "images": "images", "videos": "videos", "audios": "audios"}
CHAT = Columns({**NAMES, "messages": "messages"})
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def read(row, name="openai", columns=CHAT):
    return find("formats", name).read(row, columns)


def openai(*contents, images=None):
    turns = [{"role": "user", "content": content} for content in contents]
    row = {"messages": [*turns, {"role": "assistant", "content": "yes"}]}
    return row if images is None else row | {"images": images}


def shown(example):
    return [(message.content, message.media) for message in example.prompt]


def test_openai_markers_take_images_in_order():
    row = openai("<image>a", "b <image> c <image>", images=["1.png", "2.png", "3.png"])
    assert shown(read(row)) == [("<image>a", ("1.png",)), ("b <image> c <image>", ("2.png", "3.png"))]


def test_sharegpt_and_alpaca_markers_take_images():
    talk = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}], "images": ["1"]}
    assert shown(read(talk, "sharegpt", Columns(NAMES))) == [("<image>?", ("1",))]
    row = {"instruction": "<image>what", "input": "<image>", "output": "yes", "images": ["1", "2"]}
    assert shown(read(row, "alpaca", Columns(NAMES))) == [("<image>what\n<image>", ("1", "2"))]
    row = {"instruction": "<image>", "output": ["a", "b"], "score": [1, 0], "images": ["1"]}
    assert shown(read(row, "ranked", Columns(NAMES))) == [("<image>", ("1",))]


def test_lists_of_parts():
    url = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    parts = [
        {"type": "text", "text": "a "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " b "},
        {"type": "image"},
        {"type": "image", "image": "own.png"},
    ]
    ((content, media),) = shown(read(openai(parts, images=["next.png"])))
    assert content == "a <image> b <image><image>"
    assert media == ("base64:" + base64.b64encode(PIXEL).decode(), "next.png", "own.png")


def test_bytes_and_paths_as_parquet_files_have_them():
    row = openai("<image><image>", images=[{"bytes": PIXEL, "path": "x.png"}, {"bytes": None, "path": "y.png"}])
    ((_, media),) = shown(read(row))
    assert media == ("base64:" + base64.b64encode(PIXEL).decode(), "y.png")


def test_without_the_column_a_marker_is_a_word():
    assert shown(read(openai("write <image>"))) == [("write <image>", ())]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (openai("<image>", images=[]), "as many <image> markers as images are needed"),
        (openai("<image>", images=None) | {"images": None}, "as many <image> markers as images are needed"),
        (openai("none", images=["1"]), "as many <image> markers as images are needed"),
        (openai([{"type": "image"}]), "as many <image> markers as images are needed"),
        (openai([{"type": "text", "text": "<image>"}, {"type": "image", "path": "1"}], "<image>", images=["2", "3"]),
         "as many <image> markers as images are needed"),
        (openai("<image>", images=[3]), "an image that is neither a path nor bytes"),
        (openai("<image>", images=["https://example.org/a.png"]), "an image on the web"),
        (openai("<image>", images=["data:image/png,abc"]), "an image that is neither a path nor bytes"),
        (openai([{"type": "image_url"}]), "a message that is not text"),
        (openai([{"type": "video", "video": "a.mp4"}]), "videos and audio are not supported yet"),
        (openai("a") | {"videos": ["a.mp4"]}, "videos and audio are not supported yet"),
        (openai("a") | {"audios": ["a.wav"]}, "videos and audio are not supported yet"),
        ({"messages": [{"role": "system", "content": "<image>"}, *openai("a")["messages"]], "images": ["1"]},
         "an image in a turn that cannot show any"),
        ({"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": "<image>"}],
          "images": ["1"]}, "an image in a turn that cannot show any"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(row, reason):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert caught.value.reason.startswith(reason)


def test_tags_do_not_hide_images():
    tags = dict(TAGS, role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    columns = Columns({**NAMES, "messages": "messages"}, tags)
    assert shown(read(openai("<image>", images=["1"]), "sharegpt", columns)) == [("<image>", ("1",))]
