"""What jsonargparse says of options that are wrong, as one sentence."""

from __future__ import annotations

import re
from types import NoneType

from jsonargparse import ArgumentParser

from mmrec.core.errors import UserError, nearest, one_line

LISTING = re.compile(
    r"Parser key \"(?P<option>[\w.]+)\": .*?Does not validate against any of the Union subtypes .*?Errors:"
    r"(?P<errors>.*?) Given value type: .*? Given value: (?P<value>.*)"
)
"""How jsonargparse 4.47 lists, in one line, the errors of each type of an option that has several."""
ONE_TYPE = re.compile(
    r"Parser key \"(?P<option>[\w.]+)\": Expected a (?P<kind><class .+?>)\. Got value: (?P<value>.*)"
)
NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


def parse_error(parser: ArgumentParser, message: str) -> UserError:
    """Return the error for a message of ``parser``, with the nearest option for one that it does not know."""
    message = one_line(message)
    listing = LISTING.fullmatch(message)
    if listing is not None:
        found = _sentence(listing["option"], listing["errors"], listing["value"])
        if found is not None:
            return UserError(found)
    plain = ONE_TYPE.fullmatch(message)
    if plain is not None:
        return UserError(f"--{plain['option']} is {plain['value']}; it must be {_either(_kinds(plain['kind']))}")
    # jsonargparse ends some messages with a listing of the type's options; the first sentence says what is wrong.
    unknown = re.search(r"(?:[Uu]nrecogni[sz]ed arguments?|Key|option)[^-\w]*'?(?:--)?([\w.\-]+)", message)
    hint = ""
    if re.search(r"Unable to load config ['\"]?{\s*\w+:[^\s,}]", message):
        hint = "; in YAML a space stands after a colon: {dim: 16}"
    elif unknown:
        known = [option.removeprefix("--") for option in parser._option_string_actions]
        hint = nearest(unknown[1].split("=")[0], known)
    return UserError(message + hint)


def _sentence(option: str, errors: str, value: str) -> str | None:
    """Return what is wrong with ``value`` by the errors of all types of an option; None where they do not tell."""
    for error in errors.split(" - "):
        if error.startswith("--"):  # of a parser of the class that the option names, which has been here before
            return f"--{option}.{error.removeprefix('--').strip()}"
    required = re.search(r"Option '(\w+)' is required", errors)
    if required is not None:
        return f"--{option} is not complete: give --{option}.{required[1]}, too"
    unknown = re.search(r"Option '(\w+)' is not accepted", errors)
    if unknown is not None:
        return f"--{option}.{unknown[1]} is none of the options of the class that --{option} names"
    kinds = _kinds(errors)
    if "Expected a dot import path string" in errors:
        kinds.append("the name of a class: one of Lightning's, or package.module.Class")
    if not kinds or "class_path" in value:
        return None
    return f"--{option} is {value}; it must be {_either(kinds)}"


def _either(kinds: list[str]) -> str:
    return " or ".join(kinds)


def _kinds(errors: str) -> list[str]:
    """Return what ``errors`` say that the value must be, each kind once."""
    kinds = [kind for kind in re.findall(r"<class '(\w+)'>", errors) if kind != NoneType.__name__]
    kinds = [kind for kind in kinds if kind in NAMES] or kinds
    choices = [choice for literal in re.findall(r"Literal\[(.*?)\]", errors) for choice in literal.split(", ")]
    different = dict.fromkeys(choice.strip("'") for choice in choices)
    named = [NAMES.get(kind, kind) for kind in kinds]
    return [*named, f"one of {', '.join(different)}"] if different else named
