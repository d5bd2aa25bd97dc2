"""http: and https: URLs as they were sent: signatures are computed over the exact characters of path and query."""

from __future__ import annotations

from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

from vitrine_vlm.errors import MediaError
from vitrine_vlm.service_runtime.shown_urls import shown_url

_MAX_LENGTH = 8192
# RFC 3986: unreserved and reserved characters, and the percent sign of escapes. "[" and "]" are sent as they are, as
# curl and browsers do.
_LEGAL = "-._~:/?#[]@!$&'()*+,;=%"


def parse_url(text: str, base: URL | None = None) -> URL:
    """Parses a URL, or one relative to `base`. Path and query stay as they are; only illegal characters are escaped.

    Raises:
        MediaError: it is not a valid URL.
    """
    if len(text) > _MAX_LENGTH:
        raise MediaError(f"a URL of {len(text)} characters: at most {_MAX_LENGTH} are accepted")
    try:
        whole = text if base is None else urljoin(str(base), text)
        url = URL(whole)
        if url.scheme not in ("http", "https"):
            return url
        parts = urlsplit(whole)
        if not url.raw_host:
            raise MediaError(f"{shown_url(whole)} is not valid: it names no host")
        # yarl writes the host as the network needs it, but would also rewrite escapes in path and query.
        return URL.build(
            scheme=url.scheme,
            authority=url.raw_authority,
            path=_escaped(parts.path) or "/",
            query_string=_escaped(parts.query),
            encoded=True,
        )
    except ValueError:
        # Without its cause, here and in `loader`: its text has the whole URL.
        raise MediaError(f"{shown_url(text)} is not valid: give an http:, https:, data: or file: URL") from None


def _escaped(text: str) -> str:
    return quote(text, safe=_LEGAL)
