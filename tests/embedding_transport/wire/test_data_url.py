"""data: URLs are read as browsers read them."""

from __future__ import annotations

import base64
import itertools
import string
from urllib.parse import quote, quote_from_bytes

import pytest

from vitrine_vlm.embedding_transport.wire import data_url
from vitrine_vlm.embedding_transport.wire.data_url import decode_base64, is_data_url, read_data_url
from vitrine_vlm.errors import MediaError, MediaTooLarge

BYTES = bytes(range(256))
BASE64 = base64.b64encode(BYTES).decode()
ALPHABET = set(string.ascii_letters + string.digits + "+/")


def forgiving(payload: str) -> bytes | None:
    """WHATWG Infra, "forgiving-base64 decode", step by step; None for its failure."""
    text = "".join(each for each in payload if each not in " \t\n\r\f")
    if len(text) % 4 == 0:
        text = text.removesuffix("=").removesuffix("=")
    if len(text) % 4 == 1 or not set(text) <= ALPHABET:
        return None
    return base64.b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.parametrize("piece_chars", [4, 8, 1 << 20])
def test_base64_is_decoded_as_browsers_do(piece_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_url, "_PIECE_CHARS", piece_chars)
    made = ["".join(characters) for length in range(6) for characters in itertools.product("AQ/=-\n", repeat=length)]
    made += ["".join(characters) for characters in itertools.product("Q/=_", repeat=8) if characters[0] == "Q"]
    made += [BASE64, BASE64 * 2, BASE64.rstrip("="), BASE64.replace("/", "_"), "é" * 4, "QUJé", " Q U I\r\n = ", "QUI"]
    for payload in made:
        expected = forgiving(payload)
        if expected is None:
            with pytest.raises(ValueError):
                decode_base64(payload)
        else:
            assert decode_base64(payload) == expected, payload


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"data:image/png;base64,{BASE64}", BYTES),
        (f"DATA:;BASE64,{BASE64}", BYTES),
        (f"data:image/png;charset=x;base64,{BASE64.replace('+', '%2B')}", BYTES),
        (f"data:image/png; base64 ,{BASE64}", BYTES),
        (f"data:image/png;base64,{quote(BASE64, safe='')}", BYTES),
        (f"data:image/png;base64,{BASE64.rstrip('=')}", BYTES),
        (f"data:image/png;base64,{base64.encodebytes(BYTES).decode()}", BYTES),
        (f"data:image/png;base64,\r\n {BASE64[:77]}%0D%0A{BASE64[77:]}#part", BYTES),
        (f"data:image/png,{quote_from_bytes(BYTES)}", BYTES),
        ("data:,plain", b"plain"),
        ("data:image/png;base64,", b""),
        ("data:text/plain;name=base64,QUJD", b"QUJD"),
    ],
)
@pytest.mark.parametrize("piece_chars", [4, 1 << 20])
def test_data_urls(url: str, expected: bytes, piece_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_url, "_PIECE_CHARS", piece_chars)
    assert is_data_url(url)
    assert read_data_url(url, 256) == read_data_url(url) == expected


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64", "data:;base64,AAAAA", "data:;base64,AA==AA", "data:;base64,AA=", "data:;base64,-_==",
     "data:;base64,A*A=", "data:;base64,AA%4", "data:,%4", "data:,%zz", "data:,\u00e9", "data:;base64,\u00e9\u00e9==",
     "data:,%41\ud800", "data:,abc%4", "data:,ab%%41"],
)  # fmt: skip
@pytest.mark.parametrize("piece_chars", [4, 1 << 20])
def test_malformed_data_urls(url: str, piece_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_url, "_PIECE_CHARS", piece_chars)
    with pytest.raises(MediaError) as caught:
        read_data_url(url, 256)
    assert type(caught.value) is MediaError


@pytest.mark.parametrize(
    "url",
    [f"data:;base64,{BASE64}", f"data:,{quote_from_bytes(BYTES)}", "data:," + "a" * 256, "data:;base64," + "=" * 2**21],
)
def test_large_data_urls_are_refused_without_their_content(url: str) -> None:
    with pytest.raises(MediaTooLarge) as caught:
        read_data_url(url, 255)
    assert len(str(caught.value)) < 120
