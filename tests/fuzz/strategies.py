"""What people and programs write into files when nobody looks."""

from __future__ import annotations

import json

from hypothesis import strategies as st

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "null", "true", "no", "yes", "1e-4", "1.10", ".nan", ".inf", "-.inf", "0x1f", "1_000", "2024-13-45",
         "12:30:00", "${x}", "${", "${oc.env:HOME}", "${a.b}", "a: b", "- a", "[", "{", "}", "&a *a", "!!python/none x",
         "!!binary ====", "<<", "=", "~", "a,b", ",", "%", "@x", "`x", "\t", "#", "'", '"', "é", "\ud83d\ude00",
         "\u2028", "\ufeff", "\x00", "|", ">", "../..", "/dev/null", "none", "auto", "all", "steps", "x" * 300]
    ),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([10**400, -(10**30), 2**31, 2**63, 1e308, 5e-324])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def nested(leaves: st.SearchStrategy) -> st.SearchStrategy:
    """Values of JSON with these leaves."""
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
        max_leaves=8,
    )


VALUES = nested(SCALARS)
DEEP = st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth)
"""Brackets that no parser likes."""


def mess(texts: st.SearchStrategy) -> st.SearchStrategy:
    """Texts as bytes, the way files go wrong: another encoding, a byte order mark, cut off, garbage inside."""

    def spoil(parts: tuple[str, str, bytes, int]) -> bytes:
        text, how, garbage, at = parts
        raw = text.encode("utf-8", "surrogatepass")
        return {
            "": raw,
            "crlf": raw.replace(b"\n", b"\r\n"),
            "cr": raw.replace(b"\n", b"\r"),
            "bom": b"\xef\xbb\xbf" + raw,
            "utf-16": text.encode("utf-16", "surrogatepass"),
            "latin": text.encode("latin-1", "replace"),
            "cut": raw[: at % (len(raw) + 1)],
            "garbage": raw[: at % (len(raw) + 1)] + garbage + raw[at % (len(raw) + 1) :],
            "blank": b"\n\n  \n" + raw + b"\n\t\n" + b" " * 100 + b"\n",
        }[how]

    ways = st.sampled_from(["", "", "", "crlf", "cr", "bom", "utf-16", "latin", "cut", "garbage", "blank"])
    return st.tuples(texts, ways, st.binary(max_size=4), st.integers(0, 10_000)).map(spoil)


def as_json(value: object) -> str:
    """JSON as Python writes it, NaN and all."""
    return json.dumps(value, ensure_ascii=False)
