"""What is typed is what a command gets: texts as they are, whole numbers of 64 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import fit

from mmrec.cli import COMMANDS, import_function
from mmrec.core.errors import UserError
from mmrec.core.options import Parser, TextAction, add_options, call

Command = Callable[..., int]
TYPED = ("# Act I", "null", "~", "---", "-x", "--x", "5", "1e3", "true", "[a]", "{a: 1}", "a: b", "- a", "!tag", " ")


@dataclass
class Nested:
    """A group.

    Args:
        text: a text.
        path: a path.
    """

    text: str | None = None
    path: Path | None = None


@dataclass
class Flat:
    """Options of their own.

    Args:
        name: a text.
        folder: a path.
    """

    name: str | None = None
    folder: Path = Path()


NESTED = Nested()


def takes_all(
    flat: Flat, prompt: str | None = None, memory: Path | str | None = None, nested: Nested = NESTED
) -> None:
    """Take options of every kind.

    Args:
        flat: options of their own.
        prompt: a text.
        memory: a path or a text.
        nested: a group.
    """
    taken.update(
        {
            "prompt": prompt,
            "memory": memory,
            "name": flat.name,
            "folder": flat.folder,
            "nested.text": nested.text,
            "nested.path": nested.path,
        }
    )


taken: dict[str, Any] = {}


@pytest.mark.parametrize("typed", TYPED)
def test_a_text_is_what_was_typed(typed: str) -> None:
    options = ("prompt", "memory", "name", "folder", "nested.text", "nested.path")
    forms: tuple[Callable[[str], list[str]], ...] = (
        lambda name: [f"--{name}", typed],
        lambda name: [f"--{name}={typed}"],
    )
    for form in forms:
        taken.clear()
        call(takes_all, Parser(prog="test"), [part for name in options for part in form(name)])
        assert {name: str(value) for name, value in taken.items()} == {
            name: str(Path(typed)) if isinstance(taken[name], Path) else typed for name in options
        }


def test_a_text_that_is_left_out_is_the_default() -> None:
    taken.clear()
    call(takes_all, Parser(prog="test"), [])
    assert set(taken.values()) == {None, Path()}


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.parses])
def test_every_text_of_every_command_is_taken_as_typed(name: str) -> None:
    parser = Parser(prog=name)
    COMMANDS[name].arguments(parser)
    add_options(import_function(name), parser)
    texts = [action for action in parser._actions if isinstance(action, TextAction)]
    lists = ("Literal", "list", "dict", "Sequence", "Mapping")
    hints = {a.dest: str(getattr(a, "_typehint", "")) for a in parser._actions}
    strings = {dest: hint for dest, hint in hints.items() if "str" in hint}
    assert {dest for dest, kind in strings.items() if not any(part in kind for part in lists)} <= {
        a.dest for a in texts
    }
    assert texts
    options = {action.dest: action.option_strings[0] for action in texts}
    needed = [f"--{dest}=hf" for dest in {*parser.required_args} - {*options}]
    needed = [option for option in needed if option.partition("=")[0] in parser._option_string_actions]
    positional = ["text"] if name in ("read", "score", "report") else []
    for typed in TYPED:  # all of them at once: a parser takes a twentieth of a second
        values = parser.parse_args([*positional, *needed, *(part for o in options.values() for part in (o, typed))])
        taken_as = {dest: values[dest] for dest in options}
        assert {dest: str(value) for dest, value in taken_as.items()} == {
            dest: typed if isinstance(value, str) else str(Path(typed)) for dest, value in taken_as.items()
        }


def test_two_dashes_are_a_text_where_they_are_joined_to_their_option() -> None:
    taken.clear()
    options = ("prompt", "memory", "name", "folder", "nested.text", "nested.path")
    call(takes_all, Parser(prog="test"), [f"--{name}=--" for name in options])
    assert {str(value) for value in taken.values()} == {"--"}
    for rest in (["--prompt", "--"], ["--prompt", "--", "x"], ["--folder", "--"]):
        with pytest.raises(
            UserError, match=f"{rest[0]}: expected one argument; two dashes as a text are {rest[0]}=--"
        ):
            call(takes_all, Parser(prog="test"), rest)


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("[a.txt,b.txt]", ["a.txt", "b.txt"]),
        ("[ a b.txt , c ]", ["a b.txt", "c"]),
        ("[]", []),
        ("[a,]", ["a"]),
        ("a.txt", ["a.txt"]),
        ("a, b: c.txt", ["a, b: c.txt"]),
        ("x[1].txt", ["x[1].txt"]),
        ("[x].txt", ["[x].txt"]),
        ("[x[1].txt, [y]]", ["x[1].txt", "[y]"]),
        ("[a: b.txt, {c}, # d, 2 #e.txt]", ["a: b.txt", "{c}", "# d", "2 #e.txt"]),
        ("[007, 1e5, null, yes, ~, 0x1F, 2024-01-01]", ["007", "1e5", "null", "yes", "~", "0x1F", "2024-01-01"]),
        ("[!a, &b, *c, @d, `e, %f, -g, - h]", ["!a", "&b", "*c", "@d", "`e", "%f", "-g", "- h"]),
        ("['a, b.txt', \"c, d\", ' e ', 'it''s', \"\\\"\"]", ["a, b.txt", "c, d", " e ", "it's", '"']),
        ("[it's.txt, a\"b.txt, C:\\d]", ["it's.txt", 'a"b.txt', "C:\\d"]),
    ],
)
def test_a_list_of_texts_is_what_was_typed(typed: str, texts: list[str]) -> None:
    parser = Parser(prog="test")
    parser.add_argument("--files", type=Sequence[str], default=())
    parser.add_argument("--more", type=list[str] | None, default=None)
    for form in (["--files", typed, "--more", typed], [f"--files={typed}", f"--more={typed}"]):
        values = parser.parse_args(form)
        assert (values.files, values.more) == (texts, texts)


@pytest.mark.parametrize(
    ("typed", "says"), [("", "empty"), ("[a,,b]", "empty"), ("['a, b]", "quote"), ("['a'b]", "quote")]
)
def test_a_list_that_is_none_is_refused(typed: str, says: str) -> None:
    parser = Parser(prog="test")
    parser.add_argument("--files", type=Sequence[str], default=())
    with pytest.raises(UserError, match=says) as refused:
        parser.parse_args([f"--files={typed}"])
    assert "--files" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_number_that_is_none_is_refused_by_its_kind() -> None:
    parser = Parser(prog="test")
    parser.add_argument("--share", type=float | None, default=None)
    parser.add_argument("--count", type=int | None, default=None)
    for typed, says in (
        ("--share=nan", "--share is nan; it must be a number"),
        ("--count=1.5", "--count is 1.5; it must be a whole number"),
        ("--count=many", "--count is many; it must be a whole number"),
    ):
        with pytest.raises(UserError, match=f"^{says}$"):
            parser.parse_args([typed])


def test_an_option_is_never_taken_for_the_text_before_it() -> None:
    for rest in (["--prompt", "--memory", "x"], ["--prompt", "--memory=x"], ["--prompt"], ["--prompt", "-h"]):
        with pytest.raises(UserError, match="--prompt: expected one argument"):
            call(takes_all, Parser(prog="test"), rest)


def test_texts_of_a_training_and_of_its_config_are_taken_as_typed(
    mmrec: Command, prepared: Path, tmp_path: Path
) -> None:
    tokens, root = tmp_path / "# tokens", "# logs"
    tokens.symlink_to(prepared)
    options = ["--trainer.max_steps=1", "--trainer.default_root_dir", root, "--run", "~"]
    assert mmrec(*fit(Path("# tokens"), *options)) == 0
    saved = tmp_path / root / "lightning_logs" / "~" / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert (config["run"], config["data"]["data_dir"]) == ("~", "# tokens")
    assert config["trainer"]["default_root_dir"] == root
    assert mmrec("fit", "--trainer.default_root_dir", root, "--run", "~", "--ckpt_path", "last") == 0
    assert [path.name for path in saved.parent.parent.glob("[!.]*")] == ["~"]


def test_numbers_of_more_than_64_bits_are_refused(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = str(10**30)
    commands = [
        ["generate", "--seed", big],
        ["generate", "--length", f"-{big}"],
        ["generate", "--seed", f"-{2**63 + 1}"],
        ["serve", "--port", big],
        ["prepare", "sample", "--vocab_size", big],
        ["bench", "--threads", big],
        ["eval", "length", "--positions", f"[1, {big}]"],
        fit(prepared, f"--seed_everything={big}"),
        fit(prepared, f"--trainer.max_steps={big}"),
        fit(prepared, f"--data.batch_size={big}"),
        [*fit(prepared), f"--model.config={{dim: {big}}}"],
    ]
    for command in commands:
        assert mmrec(*command) == 2, command
        said = capsys.readouterr().err
        assert "; it must be a whole number of 64 bits" in said, command
        assert "number of 64 bits;" not in said
    for seed in (-1, 2**32):
        assert mmrec(*fit(prepared, f"--seed_everything={seed}")) == 2
        assert f"--seed_everything is {seed}; it must be from 0 to 4294967295" in capsys.readouterr().err
