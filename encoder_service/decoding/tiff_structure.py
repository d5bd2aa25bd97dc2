"""Bounds the first directory of a TIFF."""

from __future__ import annotations

from typing import Literal

from vitrine_vlm.errors import MediaTooLarge

# Published tags, and makers' own.
_MAX_ENTRIES = 1024
# Of one entry: a picture of 67 million pixels in tiles of 16x16 has 262,144.
_MAX_VALUES = 262_144
# Bytes of a value by its type, of those that Pillow unpacks one by one.
_VALUE_NBYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


def check_tiff(data: bytes) -> None:
    """Reads the entries of the first directory. Pillow skips those whose values are not in the file.

    Raises:
        MediaTooLarge: too many entries, or values in one.
    """
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    is_big = int.from_bytes(data[2:4], order) == 43  # BigTIFF
    count_nbytes, entry_nbytes, offset_nbytes = (8, 20, 8) if is_big else (2, 12, 4)
    start = int.from_bytes(data[8:16] if is_big else data[4:8], order)
    declared = int.from_bytes(data[start : start + count_nbytes], order)
    num_entries = min(declared, max(0, len(data) - start - count_nbytes) // entry_nbytes)
    if num_entries > _MAX_ENTRIES:
        raise MediaTooLarge(f"a TIFF with {num_entries} entries: at most {_MAX_ENTRIES} are accepted")
    for index in range(num_entries):
        at = start + count_nbytes + index * entry_nbytes
        kind = int.from_bytes(data[at + 2 : at + 4], order)
        num_values = int.from_bytes(data[at + 4 : at + 4 + offset_nbytes], order)
        nbytes = num_values * _VALUE_NBYTES.get(kind, 0)
        if num_values > _MAX_VALUES and 0 < nbytes <= len(data):
            raise MediaTooLarge(
                f"a TIFF with {num_values} values in an entry, as of its tiles: at most {_MAX_VALUES} are accepted"
            )
