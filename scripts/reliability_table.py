"""Write what the tests of reliability measured into the table of docs/reliability.md."""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"


def table(lines: list[str]) -> str:
    """Return the rows in the order of the tests' names, one a promise, where several tests noted the same."""
    rows: dict[str, tuple[str, str]] = {}
    for note in sorted(map(json.loads, lines), key=lambda note: note["test"]):
        test = re.sub(r"\[.*", "", note["test"])
        rows[note["promise"]] = (test, note["figure"])
    system = f"Python {platform.python_version()}, torch {version('torch')}, lightning {version('lightning')}"
    head = [f"Measured with {system}.", "", "| promise | test | figure |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {promise} | `{test}` | {figure} |" for promise, (test, figure) in rows.items())])


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    new = table(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    page = re.sub(r"(<!-- table -->\n).*(<!-- end -->)", lambda m: m[1] + new + "\n" + m[2], page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")
    print(new)


if __name__ == "__main__":
    main()
