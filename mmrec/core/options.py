"""Command-line parsing with errors of one line, and configs found by name."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NoReturn, Union, cast, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._core import ArgumentGroup
from jsonargparse._typehints import ActionTypeHint, adapt_typehints

from mmrec.core.config_files import check_config
from mmrec.core.errors import UserError, nearest
from mmrec.core.parse_errors import parse_error

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def _kinds(typehint: Any) -> tuple[Any, ...]:
    """Return the types of an option, without the None of one that may be left out."""
    kinds = get_args(typehint) if get_origin(typehint) in (Union, UnionType) else (typehint,)
    return tuple(kind for kind in kinds if kind is not NoneType)


def _is_text(typehint: Any) -> bool:
    """Whether an option is a text or a path."""
    kinds = _kinds(typehint)
    return bool(kinds) and all(
        isinstance(kind, type) and (kind is str or issubclass(kind, os.PathLike)) for kind in kinds
    )


def _is_text_list(typehint: Any) -> bool:
    """Whether an option is a list of texts."""
    kinds = _kinds(typehint)
    return len(kinds) == 1 and get_origin(kinds[0]) in (Sequence, list) and get_args(kinds[0]) == (str,)


class TextAction(ActionTypeHint):
    """An option of text or path: its value is what was typed, where jsonargparse would read YAML.

    ``--prompt "# Act I"`` would be None to it, as ``null``, ``~`` and ``---`` are (jsonargparse 4.47).
    """

    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        if type(value) is not str:
            check: Any = super()._check_type  # without annotations
            return check(value, append=append, cfg=cfg, mode=mode)
        kinds = _kinds(self._typehint)
        return value if str in kinds else adapt_typehints(value, kinds[0], default=self.default)

    def instantiate_classes(self, value: Any) -> Any:
        return value

    def serialize(self, value: Any, dump_kwargs: Any = None) -> Any:
        return None if value is None else os.fspath(value)


class TextListAction(ActionTypeHint):
    """An option that is a list of texts: ``[a.txt, b.txt]``, or a single one without brackets.

    Each is what was typed, where jsonargparse would read YAML: ``[a: b.txt]``, ``[007]`` and ``[x[1].txt]`` are no
    texts to it, and ``[2 # 3.txt]`` is none at all. A text with a comma, or with blanks around it, stands in quotes.
    """

    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        if type(value) is str:
            try:
                value = split_list(value)
            except ValueError as error:
                raise TypeError(f"--{self.dest} is {value!r}: {error}") from None
        check: Any = super()._check_type  # without annotations
        return check(value, append=append, cfg=cfg, mode=mode)


_ITEM = re.compile(r"""\s*(?:("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*(?=,|$)|([^,]*))""", re.DOTALL)


def split_list(typed: str) -> list[str]:
    """Return the texts of a list as it is typed; one without brackets is a text by itself.

    Raises:
        ValueError: a text is empty, or a quote is not closed.
    """
    if not (typed.startswith("[") and typed.endswith("]")):
        return _not_empty([typed])
    inside, place = typed[1:-1], 0
    found: list[str] = []
    while place < len(inside) and inside[place:].strip():
        item = _ITEM.match(inside, place)
        assert item is not None  # its second form is any text
        quoted, plain = item.groups()
        if quoted is None and plain[:1] in ("'", '"'):
            raise ValueError(f"the quote before {plain[1:13]!r} is not closed before the next comma")
        found.append(plain.strip() if quoted is None else str(yaml.safe_load(quoted)))
        place = item.end() + 1
    return _not_empty(found)


def _not_empty(texts: list[str]) -> list[str]:
    if "" in texts:
        raise ValueError("one of its texts is empty; write a list as [a, b], and a text with a comma in quotes")
    return texts


class _TextOptions:
    """Adds options of text or path as :class:`TextAction`, lists of texts as :class:`TextListAction`."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        action = super().add_argument(*args, **kwargs)  # type: ignore[misc]
        if type(action) is ActionTypeHint and _is_text(action._typehint):
            action.__class__ = TextAction
        elif type(action) is ActionTypeHint and _is_text_list(action._typehint):
            action.__class__ = TextListAction
        return action


class _Group(_TextOptions, ArgumentGroup):
    """A group of options of a :class:`Parser`."""


class Parser(_TextOptions, ArgumentParser):
    """A parser that takes texts as they were typed, whole numbers of 64 bits, and says errors in one line.

    Raises:
        UserError: of :func:`mmrec.core.parse_errors.parse_error`, wherever argparse would print its usage and exit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group_class = _Group

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise parse_error(self, message)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Return the options as a namespace; UserError where a whole number does not fit into 64 bits."""
        values: Namespace = super().parse_args(*args, **kwargs)
        self._refuse_null(values)
        for name, value in _numbers(values.as_dict(), ""):
            if not -(2**63) <= value < 2**64:
                bits = value.bit_length() + (value < 0)  # with its sign
                self.error(f"--{name} is a number of {bits} bits; it must be a whole number of 64 bits")
        return values

    def _refuse_null(self, values: Namespace) -> None:
        """Refuse an option that a config sets to null and that needs a value (jsonargparse 4.47 lets it pass)."""
        of_command = self._subcommands_action and values.get("subcommand")
        if of_command:
            self._subcommands_action.choices[of_command]._refuse_null(values[of_command])  # type: ignore[union-attr]
        for action in self._actions:
            if not isinstance(action, ActionTypeHint) or action.default is None:
                continue
            if values.get(action.dest, action.default) is None and NoneType not in get_args(action._typehint):
                self.error(f"--{action.dest} is null; give it a value, or leave it out")

    def _parse_known_args(self, arg_strings: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._parse_known_args(self._with_values(list(arg_strings)), *args, **kwargs)

    def _get_values(self, action: Any, arg_strings: list[str]) -> Any:
        if isinstance(action, TextAction) and action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")  # which argparse would take for the end of the options
        return super()._get_values(action, arg_strings)

    def _with_values(self, args: list[str]) -> list[str]:
        """Return ``args`` with a text that begins with a dash joined to its option, as argparse wants it."""
        known = self._option_string_actions
        joined: list[str] = []
        for arg in args:
            before = joined[-1] if joined else ""
            text = isinstance(known.get(before), TextAction) and "--" not in joined
            if text and arg == "--":
                self.error(f"argument {before}: expected one argument; two dashes as a text are {before}=--")
            if text and arg.startswith("-") and arg not in ("-", "--") and arg.partition("=")[0] not in known:
                joined[-1] = f"{before}={arg}"
            else:
                joined.append(arg)
        return joined


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in the options ``value``, each with the name of its option."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int):
        yield name, value


def add_options(function: Callable[..., object], parser: Parser) -> dict[str, type[DataclassInstance]]:
    """Add the options that the signature and the docstring of ``function`` describe; return its dataclasses by name.

    Args:
        function: the fields of a parameter without a default whose type is a dataclass are options of their own; one
            with a default stays a group, its fields options with the group's name before them.
        parser: may have some of the parameters already, where their names are not all there is to say.
    """
    parameters, hints = inspect.signature(function).parameters, get_type_hints(function)
    needed = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    groups = {name: cast("type[DataclassInstance]", hints[name]) for name in needed if is_dataclass(hints[name])}
    known = {action.dest for action in parser._actions}
    parser.add_function_arguments(function, skip={*groups, *(known & {*parameters})})
    for group in groups.values():
        parser.add_class_arguments(group, skip={*(known & {f.name for f in fields(group)})})
    return groups


def call(function: Callable[..., object], parser: Parser, args: list[str]) -> None:
    """Call ``function`` with what ``args`` say, by the options that :func:`add_options` gives ``parser``."""
    groups = add_options(function, parser)
    values = vars(parser.instantiate_classes(parser.parse_args(args)))
    made = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
    function(**values, **made)


def config_folder() -> Path:
    """Return the folder of the configs that come with the program."""
    beside = Path(__file__).parents[2] / "configs"
    return beside if beside.is_dir() else Path(str(files("mmrec"))) / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configs by name, as "tiny" or "trainer/cpu"."""
    folder = config_folder()
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """Return the config file that ``name`` means: a file, or the name of a shipped one."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    if plain in shipped:
        return shipped[plain]
    raise UserError(f"no config {name!r}: neither a file nor one of {', '.join(shipped)}{nearest(plain, shipped)}")


def resolve_configs(args: list[str], sections: Collection[str] = ()) -> list[str]:
    """Return ``args`` with every ``--config NAME`` made the path of its file.

    Raises:
        UserError: there is no such file, or :func:`mmrec.core.config_files.check_config` refuses it.
    """

    def checked(name: str) -> str:
        path = find_config(name)
        check_config(path, sections)
        return str(path)

    resolved: list[str] = []
    flags = ("-c", "--config")
    for arg in args:
        if resolved and resolved[-1] in flags:
            resolved.append(checked(arg))
        elif arg.startswith("--config="):
            resolved.append(f"--config={checked(arg.removeprefix('--config='))}")
        else:
            resolved.append(arg)
    return resolved


def given(args: list[str], option: str) -> Any:
    """Return the last value of ``--option VALUE`` or ``--option=VALUE`` in ``args``, or None."""
    value = None
    for index, arg in enumerate(args):
        if arg == f"--{option}" and index + 1 < len(args):
            value = args[index + 1]
        elif arg.startswith(f"--{option}="):
            value = arg.split("=", 1)[1]
    return value
