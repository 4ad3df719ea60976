"""Where the files in a tar are, without extracting any.

Names and sizes are bounded, and links, devices and sparse files are passed over. A name is only a name here: it leads
nowhere.

Reference: the ustar and pax formats of POSIX.1-2001, and GNU tar's long names and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from flax_diffusion.core.errors import shown

_BLOCK = 512
_MAX_NAME_BYTES = 2**16


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def members(stream: BinaryIO) -> Iterator[Member]:
    """Yield the regular files of a tar, whose headers alone are read.

    Args:
        stream: The tar, in which the caller may seek between two of them.

    Raises:
        ValueError: If it is damaged, cut off or no tar.
    """
    size = stream.seek(0, 2)
    place, long_name, long_size = 0, None, None
    while place < size:
        stream.seek(place)
        header = stream.read(_BLOCK)
        if header.count(0) == _BLOCK:
            return
        if len(header) < _BLOCK or not _has_checksum(header):
            raise ValueError(f"byte {place} starts no member of a tar; it is cut off, compressed, or no tar")
        kind = header[156:157]
        length = _number(header[124:136])
        offset = place + _BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if length > _MAX_NAME_BYTES:
                raise ValueError(f"byte {place} has a name of {length} bytes; it may have {_MAX_NAME_BYTES}")
            content = stream.read(length)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                fields = _pax(content)
                long_name, long_size = fields.get(b"path", long_name), fields.get(b"size", long_size)
        else:
            if long_size is not None:
                length = int(long_size) if long_size.isdigit() else size
            if kind in (b"0", b"\0", b"7"):
                if offset + length > size:
                    raise ValueError(f"is cut off, its member at byte {place} ends after it; copy it again")
                yield Member(_name(header, long_name), offset, length)
            long_name = long_size = None
        place = offset + -(-length // _BLOCK) * _BLOCK


def _has_checksum(header: bytes) -> bool:
    told = header[148:156].strip(b" \0")
    found = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    return bool(re.fullmatch(rb"[0-7]+", told)) and int(told, 8) == found


def _number(text: bytes) -> int:
    """Return a size: in octal digits, or, as GNU has it, in base 256 after a first byte of 128."""
    if text[0] == 128:
        return int.from_bytes(text[1:], "big")
    digits = text.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"{shown(text)} is no size of a member; it is damaged, or no tar")
    return int(digits or b"0", 8)


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Return the fields of a pax header: lines of `LENGTH NAME=VALUE`, where the length is that of the line."""
    fields, place = {}, 0
    while place < len(content.rstrip(b"\0")):
        digits, _, _ = content[place : place + 8].partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(content) - place:
            raise ValueError("holds a pax header that cannot be read; it is damaged, or no tar")
        name, _, value = content[place + len(digits) + 1 : place + int(digits) - 1].partition(b"=")
        fields[name] = value
        place += int(digits)
    return fields


def _name(header: bytes, long_name: bytes | None) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:262] == b"ustar" and header[262:263] == b"\0" and header[345:346] != b"\0":
        name = header[345:500].split(b"\0")[0] + b"/" + name
    text = (name if long_name is None else long_name).decode(errors="replace")
    return text.removeprefix("./")
