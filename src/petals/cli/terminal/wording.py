"""Texts as users type and read them: UTF-8 in, sizes and durations out.

Pure. Must not know commands and terminals.
"""

import re
from collections.abc import Mapping

from petals.errors import BadInput

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SENTENCE = re.compile(r"(?<=[.;:])(?=\s)")
_NAMED_COMMAND = re.compile(r"\bpetals [a-z]+ ")

_UNITS = ("B", "kB", "MB", "GB", "TB")


def utf8(text: str | bytes, what: str) -> str:
    """``text`` as UTF-8, whatever the locale says. ``what`` names it in the error.

    Python hands over bytes that the locale's encoding cannot decode as surrogates. Raises BadInput
    if the bytes behind them are not UTF-8.
    """
    try:
        data = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{what} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start}.",
            hint="Convert it first, for example: iconv -f LATIN1 -t UTF-8.",
        ) from None
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise BadInput(
            f"{what} is not text: {ascii(error.object[error.start])} at position {error.start}.",
            hint="Type it as UTF-8.",
        ) from None


def respell_flags(text: str, spelling: Mapping[str, str]) -> str:
    """``text`` with the flags of the command at hand as that command spells them.

    A flag behind the name of a command in the same sentence is that command's.
    """

    def respell(sentence: str) -> str:
        if _NAMED_COMMAND.search(sentence):
            return sentence
        return FLAG.sub(lambda found: spelling.get(found[0], found[0]), sentence)

    return "".join(map(respell, SENTENCE.split(text)))


def duration(seconds: float) -> str:
    """``59 s``, ``12 min``, ``3 h 5 min``, ``2 d 1 h``."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days:.0f} d {hours % 24:.0f} h"
    if hours:
        return f"{hours:.0f} h {minutes % 60:.0f} min"
    return f"{minutes:.0f} min" if minutes else f"{seconds:.0f} s"


def size(num_bytes: float) -> str:
    """``1.5 GB``, in powers of 1000."""
    amount, unit = float(num_bytes), 0
    while amount >= 999.95 and unit + 1 < len(_UNITS):
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{amount:.0f} B"
