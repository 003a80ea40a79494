"""Command-line parsing with errors of one line, and configs found by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast, get_type_hints

from jsonargparse import ArgumentParser

from mmrec.core.config_files import check_config
from mmrec.core.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def parse_error(parser: ArgumentParser, message: str) -> UserError:
    """Return the error for a message of ``parser``, with the nearest option for one that it does not know."""
    text = one_line(message)
    # jsonargparse ends some messages with a listing of the type's options; the first sentence says what is wrong.
    unknown = re.search(r"(?:[Uu]nrecogni[sz]ed arguments?|Key|option)[^-\w]*'?(?:--)?([\w.\-]+)", text)
    hint = ""
    if re.search(r"Unable to load config ['\"]?{\s*\w+:[^\s,}]", text):
        hint = "; in YAML a space stands after a colon: {dim: 16}"
    elif unknown:
        known = [option.removeprefix("--") for option in parser._option_string_actions]
        hint = nearest(unknown[1].split("=")[0], known)
    return UserError(text + hint)


class Parser(ArgumentParser):
    """A parser whose errors are :class:`mmrec.core.errors.UserError`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise parse_error(self, message)


def call(function: Callable[..., object], parser: Parser, args: list[str]) -> None:
    """Call ``function`` with what ``args`` say: options that its signature and docstring describe.

    Args:
        function: a parameter without a default whose type is a dataclass gets an instance of it, each field an option
            of its own; one with a default stays a group, its fields options with the group's name before them.
        parser: may have some of the parameters already, where their names are not all there is to say.
        args: what was typed.
    """
    parameters, hints = inspect.signature(function).parameters, get_type_hints(function)
    needed = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    groups = {name: cast("type[DataclassInstance]", hints[name]) for name in needed if is_dataclass(hints[name])}
    known = {action.dest for action in parser._actions}
    parser.add_function_arguments(function, skip={*groups, *(known & {*parameters})})
    for group in groups.values():
        parser.add_class_arguments(group, skip={*(known & {f.name for f in fields(group)})})
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
