"""Which GGUF file of several: ``owner/name:Q4_K_M``, ``folder:Q8_0``, ``owner/name/file.gguf``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

_SIZES: Final = ("_M", "_S", "_L", "_XL", "_XS", "_XXS")  # what llama.cpp's mixtures append to the name of a type
_NO_MODEL: Final = ("mmproj", "imatrix")  # GGUF files beside a model that are none
_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufPick:
    """The file called ``file``, or the one in quantisation ``quant``, or the only one if both are None."""

    quant: str | None = None
    file: str | None = None

    def choose(self, names: Iterable[str]) -> list[str]:
        """The file out of ``names`` (paths in a repo), with all parts of a split one, the first part first.

        Of several that fit, the one with the fewest hyphens, then the first by name. Empty if none fits.
        """
        names = sorted(names)
        fitting = sorted((name for name in names if self._fits(name)), key=lambda name: (name.count("-"), name))
        if not fitting or (self.quant is None and self.file is None and len(models(names)) != 1):
            return []
        first = fitting[0]
        return parts(first)

    def __str__(self) -> str:
        return self.file or (f"GGUF file in {self.quant}" if self.quant else "GGUF file")

    def _fits(self, name: str) -> bool:
        if self.file is not None:
            return name == self.file
        base = PurePosixPath(name).name
        if not _is_model(name) or name.count("/") > 1:
            return False
        return (
            self.quant is None
            or re.search(rf"[-._]{re.escape(self.quant)}(-.*)?\.gguf$", base, re.IGNORECASE) is not None
        )


def models(names: Iterable[str]) -> list[str]:
    """The GGUF files among ``names`` that hold a model; of a split one, the first part."""
    return sorted(name for name in names if _is_model(name))


def _is_model(name: str) -> bool:
    base = PurePosixPath(name).name
    split = re.search(r"-(\d{5})-of-\d{5}\.gguf$", base)
    return base.endswith(".gguf") and not base.startswith(_NO_MODEL) and (split is None or split[1] == "00001")


def parts(name: str) -> list[str]:
    """All files of a split model out of the name of one of them; ``name`` alone if it is not split."""
    match = _SPLIT.fullmatch(name)
    if match is None:
        return [name]
    count = min(int(match["count"]), 1000)
    return [f"{match['stem']}-{i:05d}-of-{match['count']}.gguf" for i in range(1, count + 1)]


def split_quant(name: str) -> tuple[str, str | None]:
    """``x:Q4_K_M`` -> ``(x, Q4_K_M)``; a name without a GGUF type at its end stays whole."""
    base, colon, quant = name.rpartition(":")
    return (base, quant.upper()) if colon and base and is_quant(quant) else (name, None)


def is_quant(text: str) -> bool:
    """Whether ``text`` is the name of a GGML type, with or without the size of a mixture (``Q4_K_M``)."""
    from octavo.hub.gguf_quants import FORMATS, OTHER_TYPES

    known = {format.name for format in FORMATS.values()} | set(OTHER_TYPES.values())
    bare = text.upper().removeprefix("UD-")
    return any(bare == name + size for name in known for size in ("", *_SIZES))


def file_in_repo(name: str) -> tuple[str, str] | None:
    """``owner/name/folder/file.gguf`` -> ``(owner/name, folder/file.gguf)``; None for another kind of name."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)/([^/]+(?:/[^/]+)*\.gguf)", name)
    return (match[1], match[2]) if match else None
