"""What differs between versions of SGLang: the name of the class that its receivers read, and that class's fields.

Source: the wheels of SGLang 0.5.17 to 0.5.23, `sglang/srt/disaggregation/encode_receiver.py` up to 0.5.18 and
`sglang/srt/disaggregation/encoder/receiver.py` from 0.5.19 on.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from vitrine_vlm.encoder_service.sglang.pickle_frame import Global

_log = logging.getLogger(__name__)
_FIRST_KNOWN, _LAST_KNOWN = (0, 5, 17), (0, 5, 23)
_FIRST_WITH_ENCODER_PACKAGE = (0, 5, 19)


@dataclass(frozen=True)
class ReceiverClass:
    """EmbeddingData of one version.

    unused_fields: those that are None in everything that an encoder sends.
    """

    name: Global
    unused_fields: tuple[str, ...]


def receiver_class(version: str) -> ReceiverClass:
    """Returns EmbeddingData of a version; warns of a version whose sources were not read.

    Args:
        version: such as "0.5.20" or "0.5.20.post1".

    Raises:
        ValueError: it is no version.
    """
    matched = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)([.a-z+].*)?", version)
    if matched is None:
        raise ValueError(f"--sglang-version is {version!r}: give the version of the language servers, such as 0.5.20")
    number = tuple(int(part) for part in matched.groups()[:3])
    if not _FIRST_KNOWN <= number <= _LAST_KNOWN:
        known = f"{_shown(_FIRST_KNOWN)} to {_shown(_LAST_KNOWN)}"
        _log.warning("SGLang %s is unknown to this encoder, which was made for %s: answers may fail", version, known)
    if number < _FIRST_WITH_ENCODER_PACKAGE:
        name = Global("sglang.srt.disaggregation.encode_receiver", "EmbeddingData")
        return ReceiverClass(name, ("embedding", "send_time", "cached_embedding"))
    name = Global("sglang.srt.disaggregation.encoder.receiver", "EmbeddingData")
    return ReceiverClass(name, ("embedding", "send_time", "_mr_ptr"))


def _shown(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))
