"""What fuzzing draws from: any text, any value of JSON, small changes of a value and of a file's bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
KEYS = ["name", "model", "alphabet", "files", "bytes", "sha256", "dtype", "tokens", "version", "shape", "dim"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", ".", "..", "/", "characters", "bytes", "bpe", "<u2", "<f8", "object", "V0", "S", *KEYS])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4),
    max_leaves=8,
)
"""Anything that JSON or YAML can say."""


def altered(value: Any, data: st.DataObject) -> Any:
    """Return a copy of ``value`` with one place in it removed, doubled or replaced."""
    value = copy.deepcopy(value)
    place: Any = value
    parent: Any = None
    key: Any = None
    while isinstance(place, dict | list) and place and (parent is None or data.draw(st.integers(0, 3))):
        parent = place
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place = place[key]
    if parent is None:
        return data.draw(VALUES)
    match data.draw(st.integers(0, 3)):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.append(place)
        case 2 if isinstance(place, int | str):
            more = data.draw(st.sampled_from([-1, 1, 1 << 40]))
            parent[key] = place * 2 if isinstance(place, str) else place + more
        case _:
            parent[key] = data.draw(VALUES)
    return value


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Return ``content`` with a few bytes changed, cut off, put in or moved."""
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(result)))
        match data.draw(st.integers(0, 4)):
            case 0:
                del result[place:]
            case 1:
                result[place:place] = data.draw(st.binary(min_size=1, max_size=8))
            case 2:
                del result[place : place + data.draw(st.integers(1, 64))]
            case 3:
                other = data.draw(st.integers(0, len(result)))
                result[place : place + 16] = result[other : other + 16]
            case _ if place < len(result):
                result[place] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(result)


Target = Callable[[st.DataObject], None]


def fuzz(target: Target, inputs: int) -> int:
    """Run ``target`` on ``inputs`` inputs; return how many were drawn to their end."""
    tried = 0

    @seed(0)
    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal tried
        target(data)
        tried += 1

    run()
    return tried
