"""Which clients a stream is compressed for."""

from __future__ import annotations

import re

__all__ = ["accepts_gzip"]

# RFC 9110, section 12.4.2: from 0 to 1, with three decimals at the most.
_WEIGHT = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)", re.IGNORECASE)


def accepts_gzip(accept_encoding: str | None) -> bool:
    """Whether a client wants gzip, by its ``Accept-Encoding`` (RFC 9110, section 12.5.3).

    It does when it names ``gzip`` (or ``x-gzip``, which is the same, or ``*`` for what it does not
    name) with a weight that is neither 0 nor below that of ``identity``, if it names that. Without
    the header, where the standard allows any coding, the answer is no: a client that cannot
    decompress sends none. An item that cannot be read counts as not there.
    """
    weights: dict[str, float] = {}
    for item in (accept_encoding or "").split(","):
        coding, *parameters = (part.strip() for part in item.split(";"))
        weight = 1.0
        if parameters:
            found = _WEIGHT.fullmatch(parameters[0])
            if found is None or len(parameters) > 1:
                continue
            weight = float(found[1])
        weights.setdefault(coding.lower(), weight)
    gzip = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)
