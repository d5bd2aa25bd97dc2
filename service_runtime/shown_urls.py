"""URLs in messages, logs and traces: without what may be a secret in them.

A URL may have a user and a password in front of its host, and a signature or token in its query.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_MAX_SHOWN = 100
_MAX_SCHEME = 12
_USER = re.compile(r"(?<=://)[^\s/?#\"'<>]*@")
# The query of an absolute URL or of a path, but not a question mark in a text.
_QUERY = re.compile(r"(?<=[\w/.%~)\]-])\?(?=[\w.~%\[\]-]{1,64}=)[^\s\"'<>]*")
_DATA = re.compile(r"\bdata:([\w.+/-]*(?:;[\w=.+-]*)*),[^\s\"'<>]*", re.IGNORECASE)


def shown_url(url: str) -> str:
    """Returns a URL's scheme, host and path, cut off behind 100 characters. Of other schemes the path is not shown."""
    try:
        parts = urlsplit(url)
        # In a URL such as http://user:pass/word@host/ the port is no number.
        has_host = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        return "a URL that is not valid"
    if not has_host:
        # In what is no URL, the text in front of the first colon may be anything.
        known = parts.scheme.isalnum() and len(parts.scheme) <= _MAX_SCHEME and "@" not in url
        return f"a URL with scheme {parts.scheme!r}" if known else "a URL without a scheme or a host"
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return f"{shown[:_MAX_SHOWN]}..." if parts.query or len(shown) > _MAX_SHOWN else shown


def without_url_secrets(text: str) -> str:
    """Returns a text of others, such as a library's error, with the URLs in it shortened to what `shown_url` shows."""
    if "://" in text or "?" in text:
        text = _QUERY.sub("?...", _USER.sub("", text))
    return _DATA.sub(r"data:\1,...", text) if "data:" in text.lower() else text
