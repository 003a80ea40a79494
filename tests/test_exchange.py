"""Where the memory is made that processes of one machine share; what they exchange is in tests/test_parallel.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmrec.core.errors import UserError
from mmrec.training import exchange


def test_a_file_is_made_elsewhere_where_shared_memory_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[int] = []

    def full_once(handle: int, size: int) -> None:
        tried.append(size)
        if len(tried) == 1:
            raise OSError("no room")

    def full(handle: int, size: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(exchange, "reserve", full_once)
    monkeypatch.setattr(exchange, "SHARED_MEMORY", tmp_path)
    path = Path(exchange._file_of(4096))
    assert tried == [4096, 4096]
    assert path.exists()
    assert not list(tmp_path.iterdir())
    path.unlink()
    monkeypatch.setattr(exchange, "reserve", full)
    with pytest.raises(UserError, match="there is no room"):
        exchange._file_of(10**6)
