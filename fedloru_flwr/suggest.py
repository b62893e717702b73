"""A hint at what somebody who mistyped a name may have meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``; did you mean 'rank'?``, or nothing where no known word is close."""
    spelt = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(word).lower(), list(spelt), n=1)
    return f"; did you mean {spelt[close[0]]!r}?" if close else ""
