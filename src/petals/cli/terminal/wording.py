"""Texts as users type and read them: UTF-8 in, sizes out.

Pure. Must not know commands and terminals.
"""

from petals.errors import BadInput

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


def size(num_bytes: float) -> str:
    """``1.5 GB``, in powers of 1000."""
    amount, unit = float(num_bytes), 0
    while amount >= 999.95 and unit + 1 < len(_UNITS):
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{amount:.0f} B"
