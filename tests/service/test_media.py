"""Engines fetch for clients what is public, and nothing else."""

import json
from typing import Any

import pytest

from waterline.service.body import CHAT, EMBEDDINGS, read_asked
from waterline.service.errors import RejectedError
from waterline.service.media import check_url
from waterline.service.response_relay import read_own
from waterline.service.responses import as_chat

INSIDE = "http://169.254.169.254/latest/meta-data"


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "HTTPS://user:word@Example.COM:8443/a.png?b=http://10.0.0.1/",
        "http://8.8.8.8/x",
        "http://[2606:4700:4700::1111]/x",
        "https://bücher.example/x",
        "https://example.com?x",
        "data:image/png;base64,AA==",
        " data:,x",
    ],
)
def test_what_is_public_or_in_the_request_passes(url: str) -> None:
    check_url(url, "image_url")


HOSTS = """
127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 0 10.1.2.3 172.16.0.1 192.168.1.1:8080 169.254.169.254 100.64.0.1
224.0.0.1 255.255.255.255 127.0.0.1. [::1] [::] [fe80::1] [fd00::1] [::ffff:10.0.0.1] [64:ff9b::a00:1] [2002:a00:1::]
[fe80::1%25eth0] [nonsense] localhost LOCALHOST. db.localhost redis metadata.google.internal printer.local
api.default.svc host@10.0.0.1 example.com@127.0.0.1 a@b@127.0.0.1 127.0.0.1\\@example.com 127%2e0.0.1
\uff11\uff12\uff17.0.0.1 127\u30020\u30020\u30021 \u2460\u2461\u2466.0.0.1 /127.0.0.1
"""


@pytest.mark.parametrize("host", [*HOSTS.split(), "", "\t127.0.0.1", "exa mple.com", "a" * 300], ids=ascii)
def test_what_only_our_own_network_reaches_is_refused(host: str) -> None:
    with pytest.raises(RejectedError) as caught:
        check_url(f"http://{host}/x.png", "image_url")
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "image_url", "url_not_allowed")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.com/x", "/etc/secret.png", "/etc/passwd", "http:127.0.0.1", "AA=="]
)
def test_what_is_no_url_of_the_web_is_refused(url: str) -> None:
    with pytest.raises(RejectedError, match="engines fetch nothing there"):
        check_url(url, "video_url")


def chat(part: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": [part]}], **fields}).encode()


@pytest.mark.parametrize("name", ["image_url", "video_url", "audio_url"])
@pytest.mark.parametrize("link", [INSIDE, {"url": INSIDE, "detail": "low"}], ids=["bare", "object"])
def test_wherever_a_body_has_it_and_however_it_is_written(name: str, link: object) -> None:
    with pytest.raises(
        RejectedError, match=r"'\w+_url(\.url)?' is on 169\.254\.169\.254, which is not on the public network"
    ):
        read_asked(CHAT, chat({"type": name, name: link}))
    escaped = chat({"type": name, name: link}).replace(b"_url", b"\\u005furl").replace(b"169", b"\\u0031\\u0036\\u0039")
    with pytest.raises(RejectedError, match="not on the public network"):
        read_asked(CHAT, escaped)


FORMS: list[dict[str, Any]] = [
    {"type": "image", "image": INSIDE},
    {"type": "image", "image": "/etc/secret.png"},
    {"type": "image", "url": INSIDE},
    {"type": "image", "path": "/etc/secret"},
    {"type": "image", "source": {"type": "url", "url": INSIDE}},
    {"type": "images", "images": ["data:,x", [INSIDE]]},
    {"type": "file", "file": {"url": INSIDE}},
    {"type": "file", "file": {"file_data": "file:///etc/passwd"}},
    {"type": "input_file", "file_url": INSIDE},
    {"type": "input_audio", "input_audio": {"data": "http://127.0.0.1/a.wav", "format": "wav"}},
    {"type": "audio_url", "audio_url": {"url": "/etc/passwd"}},
    {"type": "image_embeds", "image_embeds": {"pixels": INSIDE}},
    {"type": "text", "text": "hi", "anything": {"deep": [{"within": "ftp://example.com/x"}]}},
]


@pytest.mark.parametrize("part", FORMS, ids=lambda part: "-".join(map(str, part)))
def test_whatever_an_engine_might_take_for_an_address_is_one(part: dict[str, Any]) -> None:
    item = {"role": "user", "content": [{"type": "image_url", "image_url": "data:,x"}, part]}
    for endpoint, asked in (
        (CHAT, {"messages": [item]}),
        (EMBEDDINGS, {"messages": [item]}),
        (EMBEDDINGS, {"input": [item]}),
    ):
        with pytest.raises(RejectedError, match="engines fetch nothing there"):
            read_asked(endpoint, json.dumps({"model": "m", **asked}).encode())
    for output in ([part], part):
        said = {"model": "m", "input": [{"type": "function_call_output", "call_id": "1", "output": output}]}
        with pytest.raises(RejectedError, match="engines fetch nothing there"):
            read_own(json.dumps(said).encode())


def test_settings_of_processors_hold_no_addresses() -> None:
    for name, settings in (("mm_processor_kwargs", {"images": INSIDE}), ("media_io_kwargs", {"video": {"x": INSIDE}})):
        with pytest.raises(RejectedError, match="not on the public network"):
            read_asked(CHAT, chat({"type": "text", "text": "hi"}, **{name: settings}))
    passes = {"mm_processor_kwargs": {"fps": 2, "use_audio_in_video": True}, "media_io_kwargs": {"video": {"num": 4}}}
    assert read_asked(CHAT, chat({"type": "text", "text": "hi"}, **passes)).prompt_tokens == 5


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "http://localhost:3000 does not answer; file:///etc/hosts says why"},
        {"type": "thinking", "thinking": "http://10.0.0.1 …"},
        {"type": "input_audio", "input_audio": {"data": "UklGRiQ=", "format": "wav"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA==", "filename": "C:/a: b/c.pdf"}},
        {"type": "file", "file": {"file_id": "file-abc"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}, "uuid": "a:b"},
        {"type": "image_url", "image_url": None, "uuid": "known"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "tool_reference", "name": "ns:tool"},
    ],
    ids=lambda part: str(part["type"]),
)
def test_what_is_no_address_or_a_public_one_passes(part: dict[str, Any]) -> None:
    assert read_asked(CHAT, chat(part)).body == chat(part)


def test_pictures_of_responses_and_embeddings_are_looked_at_too() -> None:
    item = {"role": "user", "content": [{"type": "input_image", "image_url": INSIDE}]}
    body = json.dumps({"model": "m", "input": [item]}).encode()
    file = body.replace(b"input_image", b"input_file").replace(b"image_url", b"file_url")
    for asked in (body, file):
        with pytest.raises(RejectedError, match="not on the public network"):
            read_own(asked)
    with pytest.raises(RejectedError, match="not on the public network"):
        read_asked(CHAT, as_chat(body)[0])
    tool = {"type": "mcp", "server_label": "here", "server_url": INSIDE}
    with pytest.raises(RejectedError, match="not on the public network"):
        read_own(json.dumps({"model": "m", "input": "hi", "tools": [{"type": "web_search"}, tool]}).encode())
    with pytest.raises(RejectedError, match="not on the public network"):
        read_asked(EMBEDDINGS, chat({"type": "image_url", "image_url": INSIDE}, input="x"))


def test_a_picture_in_the_body_passes_to_the_byte() -> None:
    body = chat({"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}})
    assert read_asked(CHAT, body).body is body
    assert read_asked(CHAT, chat({"image_url": {"detail": "low"}, "type": "text", "text": "hi"})).prompt_tokens == 5
