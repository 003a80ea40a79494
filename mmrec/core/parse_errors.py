"""What jsonargparse says of options that are wrong, as one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType

from jsonargparse import ArgumentParser

from mmrec.core.errors import UserError, nearest, one_line

GROUP = re.compile(r"Parser key \"[\w.]+\": Unable to load config .* - (?=Parser key \")")
"""What jsonargparse 4.47 says before what is wrong with an option inside of braces, of which it tells twice."""
NO_GROUP = re.compile(r"Parser key \"(?P<option>[\w.]+)\": Unable to load config [\"'](?P<value>.*)[\"']")
LISTING = re.compile(
    r"Parser key \"(?P<option>[\w.]+)\": .*?Does not validate against any of the Union subtypes .*?Errors:"
    r"(?P<errors>.*?) Given value type: .*? Given value: (?P<value>.*)"
)
"""How it lists, in one line, the errors of each type of an option that has several."""
ONE_TYPE = re.compile(r"Parser key \"(?P<option>[\w.]+)\": Expected a (?P<kind>.+?)\. Got value: ?(?P<value>.*)")
NOT_OF_COMMAND = re.compile(r"Subcommand '(?P<command>\w+)' does not accept option '(?P<option>[\w.]+)'")
UNSAVED = re.compile(r"\('cannot represent an object', <?(.+?)>?\)")
NOT_SAVED = r"the default of an argument, \1, cannot be saved in a config; give that argument, too"
NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "list": "a list"}
A_CLASS = "one of Lightning's, or package.module.Class"


def parse_error(parser: ArgumentParser, message: str) -> UserError:
    """Return the error for a message of ``parser``, with the nearest option for one that it does not know."""
    message = one_line(message)
    message = GROUP.sub("", message)
    if re.search(r"Unable to load config ['\"]?{\s*\w+:[^\s,}]", message):
        return UserError(f"{message}; in YAML a space stands after a colon: {{dim: 16}}")
    found = _of_value(message)
    if found is not None:
        return UserError(found)
    of_class = re.fullmatch(r"Option '(\w+)' is not accepted", message)
    if of_class is not None:  # of the parser of a class; what it says is a part of what another parser lists
        return UserError(message + _nearest_option(of_class[1], parser))
    of_command = NOT_OF_COMMAND.fullmatch(message)
    if of_command is not None and parser._subcommands_action is not None:
        command, option = of_command["command"], of_command["option"]
        hint = _nearest_option(option, parser._subcommands_action.choices[command])
        return UserError(f"{option} is none of the options of mmrec {command}{hint}")
    dashed = re.fullmatch(r"Unrecognized arguments: (-.+)", message)
    if dashed is not None and Path(dashed[1]).exists():
        return UserError(f"{dashed[1]}: is read as an option, as all that begins with a dash; write ./{dashed[1]}")
    # jsonargparse ends some messages with a listing of the type's options; the first sentence says what is wrong.
    unknown = re.search(r"(?:[Uu]nrecogni[sz]ed arguments?|Key|option)[^-\w]*'?(?:--)?([\w.\-]+)", message)
    return UserError(message + (_nearest_option(unknown[1].split("=")[0], parser) if unknown else ""))


def instantiation_error(message: str) -> UserError | None:
    """Return the error for what jsonargparse says of a class that it could not make; None for another message.

    What the class itself said (a package that is missing, arguments that do not go together) stands in the middle of
    a listing of all the types that the option takes.
    """
    listing = re.search(r"^Does not validate against .*?^Errors:\n(.*?)^Given value type:", message, re.M | re.S)
    if listing is None:
        return None
    reasons = [one_line(reason) for reason in re.split(r"^  - ", listing[1], flags=re.M) if reason.strip()]
    told = [reason for reason in reasons if not reason.startswith(("Expected a ", "Not a valid subclass of "))]
    found = re.sub(r"Problem with given class_path '([\w.]+)':", r"\1:", " ".join(told or reasons))
    return UserError(f"--trainer options that cannot be used: {UNSAVED.sub(NOT_SAVED, found)}")


def _of_value(message: str) -> str | None:
    """Return the sentence for a message about the value of an option; None for other messages."""
    listing = LISTING.fullmatch(message)
    if listing is not None:
        return _sentence(listing["option"], listing["errors"], listing["value"])
    plain = ONE_TYPE.fullmatch(message)
    if plain is not None and _kinds(plain["kind"]):
        return _must_be(plain["option"], plain["value"], _kinds(plain["kind"]))
    group = NO_GROUP.fullmatch(message)
    if group is not None:
        return _must_be(group["option"], group["value"], ["options as {name: value}", "a file of them"])
    return None


def _nearest_option(name: str, parser: ArgumentParser) -> str:
    known = [option.removeprefix("--") for option in parser._option_string_actions]
    group, _, last = name.rpartition(".")
    of_group = [option.removeprefix(f"{group}.") for option in known if option.startswith(f"{group}.")]
    return nearest(last, of_group).replace("'", f"'{group}.", 1) if of_group else nearest(name, known)


def _sentence(option: str, errors: str, value: str) -> str | None:
    """Return what is wrong with ``value`` by the errors of all types of an option; None where they do not tell."""
    for error in errors.split(" - "):
        if error.startswith("--"):  # of a parser of the class that the option names, which has been here before
            return f"--{option}.{error.removeprefix('--').strip()}"
    required = re.search(r"Option '(\w+)' is required", errors)
    if required is not None:
        return f"--{option} is not complete: give --{option}.{required[1]}, too"
    unknown = re.search(r"Option '(\w+)' is not accepted(?P<hint>; did you mean '\w+'\?)?", errors)
    if unknown is not None:
        hint = unknown["hint"] or ""
        return f"--{option}.{unknown[1]} is none of the options of the class that --{option} names{hint}"
    missing = re.search(r"Problem with given class_path '(.+?)': (.*?)(?: - |$)", errors)
    if missing is not None:
        return f"--{option}: the class {missing[1]} cannot be loaded: {missing[2].strip()}; give {A_CLASS}"
    other = re.search(r"(?:does not correspond to|Not a valid) (?:a )?subclass of (\w+)", errors)
    name = re.search(r"Expected a dot import path string: (\S+)", errors)
    if name is not None and (name[1] != value or "class_path" in value):
        return f"--{option}: there is no class {name[1]}; give {A_CLASS}"
    kinds = _kinds(errors)
    if name is not None:
        kinds.append(f"the name of a class: {A_CLASS}")
    elif other is not None:
        kinds = [f"the name of a subclass of {other[1]}: {A_CLASS}"]
    return _must_be(option, value, kinds) if kinds and "class_path" not in value else None


def _must_be(option: str, value: str, kinds: list[str]) -> str:
    return f"--{option} is {'null' if value == 'None' else value or 'empty'}; it must be {' or '.join(kinds)}"


def _kinds(errors: str) -> list[str]:
    """Return what ``errors`` say that the value must be, each kind once."""
    kinds = [kind for kind in re.findall(r"<class '(\w+)'>", errors) if kind != NoneType.__name__]
    kinds = [kind for kind in kinds if kind in NAMES] or kinds
    if "float" in kinds and "int" in kinds:
        kinds.remove("int")
    choices = [choice for literal in re.findall(r"Literal\[(.*?)\]", errors) for choice in literal.split(", ")]
    different = dict.fromkeys(choice.strip("'") for choice in choices)
    named = [NAMES.get(kind, kind) for kind in kinds]
    return [*named, f"one of {', '.join(different)}"] if different else named
