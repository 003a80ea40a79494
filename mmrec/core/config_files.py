"""Config files: what a person's YAML must be before its options are read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from mmrec.core.errors import UserError, one_line

NULL_TAG = "tag:yaml.org,2002:null"
TEXT_TAG = "tag:yaml.org,2002:str"
"""Of a section, too: the name of another file."""
MERGE_TAG = "tag:yaml.org,2002:merge"
"""``<<``, the one key that may stand twice."""


def check_config(path: Path, sections: Collection[str] = ()) -> None:
    """Refuse a config file of which a part would be lost, or that holds no options.

    YAML keeps the last of two values of a key, and a section with nothing below it would take the defaults of its
    options away.

    Args:
        path: of the file.
        sections: keys at the top that hold options of their own.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or not YAML, is empty or no mapping, gives a key twice, or
            leaves a section without options.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start:,}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {_reason(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "holds no options"
        raise UserError(f"{path}: {what}; write them as 'trainer: {{max_epochs: 3}}'")
    _refuse_repeated_keys(path, root, set())
    for key, value in root.value:
        if key.value in sections and value.tag == NULL_TAG:
            raise UserError(f"{path}: the section {key.value!r} is empty; give it options, or leave it out")
        if key.value in sections and not isinstance(value, yaml.MappingNode) and value.tag != TEXT_TAG:
            raise UserError(f"{path}: the section {key.value!r} holds no options; write them as {{name: value}}")


def _refuse_repeated_keys(path: Path, node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE_TAG:
                if key.value in lines:
                    raise UserError(f"{path}: gives {key.value!r} twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
            _refuse_repeated_keys(path, value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(path, item, seen)


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return one_line(error)
    mark = error.problem_mark
    where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return f"{error.problem or error.context}{where}"
