"""http: and https: URLs as they were sent: signatures are computed over the exact characters of path and query."""

from __future__ import annotations

from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

from vitrine_vlm.errors import MediaError

_MAX_LENGTH = 8192
_MAX_SHOWN = 100
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
            raise MediaError(f"{text[:_MAX_SHOWN]!r} names no host")
        # yarl writes the host as the network needs it, but would also rewrite escapes in path and query.
        return URL.build(
            scheme=url.scheme,
            authority=url.raw_authority,
            path=_escaped(parts.path) or "/",
            query_string=_escaped(parts.query),
            encoded=True,
        )
    except ValueError as error:
        raise MediaError(f"{text[:_MAX_SHOWN]!r} is not a valid URL") from error


def shown_url(url: URL) -> str:
    """Returns the URL for messages: without credentials and query, which may be secrets, and not too long."""
    if url.scheme not in ("http", "https"):
        return f"a URL with scheme {url.scheme[:_MAX_SHOWN]!r}"
    shown = f"{url.origin()}{url.raw_path}"
    return f"{shown[:_MAX_SHOWN]}..." if url.raw_query_string or len(shown) > _MAX_SHOWN else shown


def _escaped(text: str) -> str:
    return quote(text, safe=_LEGAL)
