"""Asks what users call about a picture, for `helm test`: ends with 0 where the answer is as it should be.

It needs nothing but Python's library. The certificate is checked against the CA; its names are not, as users may have
others.
"""

from __future__ import annotations

import argparse
import base64
import json
import ssl
import struct
import sys
import urllib.error
import urllib.request
import zlib


def picture(side: int = 64) -> bytes:
    """Returns a red square as PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = (b"\0" + b"\xff\0\0" * side) * side
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tls_context(ca_file: str, cert_file: str, key_file: str) -> ssl.SSLContext | None:
    if not ca_file:
        return None
    context = ssl.create_default_context(cafile=ca_file)
    context.check_hostname = False
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask about a picture.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ca-file", default="")
    parser.add_argument("--cert-file", default="")
    parser.add_argument("--key-file", default="")
    parser.add_argument("--timeout-s", type=float, default=120.0)
    parser.add_argument("--expect-refusal", action="store_true", help="a request without an API key must get 401")
    arguments = parser.parse_args()
    image = "data:image/png;base64," + base64.b64encode(picture()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "Which color is this?"},
    ]
    body = {"model": arguments.model, "max_tokens": 16, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"{arguments.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    context = tls_context(arguments.ca_file, arguments.cert_file, arguments.key_file)
    try:
        with urllib.request.urlopen(request, timeout=arguments.timeout_s, context=context) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode(errors="replace")
    print(status, text)
    if arguments.expect_refusal:
        return 0 if status == 401 else 1
    return 0 if status == 200 and json.loads(text)["choices"][0]["message"]["content"] else 1


if __name__ == "__main__":
    sys.exit(main())
