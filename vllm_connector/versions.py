"""The versions of vLLM whose interface the connector is made for."""

from __future__ import annotations

import logging
import re

_FIRST_KNOWN, _LAST_KNOWN = (0, 30), (0, 33)

_log = logging.getLogger(__name__)


def warn_if_unknown(version: str) -> None:
    """Warns of a version of vLLM that the connector was not made for.

    Args:
        version: such as "0.32.0" or "0.34.1.dev5+gabc".
    """
    found = re.match(r"(\d+)\.(\d+)(?!\d)", version)
    if found is None or not _FIRST_KNOWN <= (int(found[1]), int(found[2])) <= _LAST_KNOWN:
        _log.warning(
            "VitrineConnector is made for vLLM %s to %s, this is %s: try it before you rely on it",
            ".".join(map(str, _FIRST_KNOWN)),
            ".".join(map(str, _LAST_KNOWN)),
            version,
        )
