"""The command line: the only file that knows all the others."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from mmrec import __version__
from mmrec.core.errors import UserError, exit_status, nearest
from mmrec.core.lazy_imports import put_off_compiler, put_off_metrics
from mmrec.core.options import Parser, call
from mmrec.core.runtime import configure, configure_streams, start_command
from mmrec.core.text_files import is_unicode

CORPUS_HELP = (
    "tiny_shakespeare, shakespeare_plays, sample, file, directory, openwebtext, wikipedia, c4, hf:OWNER/NAME, or "
    "your own files and folders"
)


def _prepare_arguments(parser: Parser) -> None:
    parser.add_argument("corpus", nargs="?", help=CORPUS_HELP)
    parser.add_argument("paths", nargs="*", help="files and folders, for a large corpus")
    for flag, about in {
        "force": "replace another token folder at output_dir",
        "verify": "only check the files of output_dir",
        "drop_duplicates": "keep one of several documents with the same text (large corpora)",
    }.items():
        parser.add_argument(f"--{flag}", action="store_true", help=about)


def _text_arguments(parser: Parser) -> None:
    parser.add_argument("file", help="a UTF-8 text, or - for standard input")
    parser.add_argument(
        "--learn", action="store_true", help="let the weights learn from what is read; a memory keeps the difference"
    )


def _score_arguments(parser: Parser) -> None:
    _text_arguments(parser)
    parser.add_argument("--beside", action="store_true", help="print what xz and PPMd take for the text, too")


def _export_arguments(parser: Parser) -> None:
    about = "write README.md, a model card: data, split, figures and curve of the run, intended use, licence (for hf)"
    parser.add_argument("--card", action="store_true", help=about)
    parser.add_argument("--force", action="store_true", help="replace another export at output_dir")


def _report_arguments(parser: Parser) -> None:
    parser.add_argument("run", help="name of a run in lightning_logs, or its folder")


@dataclass(frozen=True)
class Command:
    """A command, and where to find it: nothing of it is imported before it is run.

    Attributes:
        about: one line of the help.
        function: the module and the function, whose signature and docstring give the options.
        arguments: adds those of its parameters whose names are not all there is to say.
        extra: the extra of the package that it needs.
        parses: the function takes the arguments as they were typed.
        computes: it runs a model.
    """

    about: str
    function: str
    arguments: Callable[[Parser], None] = lambda parser: None
    extra: str | None = None
    parses: bool = False
    computes: bool = True


_TRAINING = "mmrec.training.cli:run_lightning"
COMMANDS = {
    "train": Command(
        "train a model on your own text, in the minutes that you have", "mmrec.planning.command:train", parses=True
    ),
    "prepare": Command(
        "turn a corpus, a file or a folder into training and validation tokens",
        "mmrec.data.prepare:prepare",
        _prepare_arguments,
        computes=False,
    ),
    "generate": Command("write text with a trained model", "mmrec.inference.generate:generate"),
    "read": Command(
        "read a text of any length, and keep what was read in a small file",
        "mmrec.inference.scoring:read",
        _text_arguments,
    ),
    "score": Command(
        "print how well a text is predicted, in total and by position",
        "mmrec.inference.scoring:score",
        _score_arguments,
    ),
    "export": Command(
        "write a trained model for transformers, llama.cpp, onnxruntime, MLX, a browser, or as one safetensors file",
        "mmrec.export.command:export",
        _export_arguments,
    ),
    "serve": Command(
        "answer requests of OpenAI's completions API, and show a page to type in",
        "mmrec.serve.command:serve",
        extra="serve",
    ),
    "eval": Command(
        "measure what the memory remembers, beside other models", "mmrec.evals.command:evaluate", parses=True
    ),
    "report": Command(
        "write a page about a run that opens without a network",
        "mmrec.report.page:report",
        _report_arguments,
        computes=False,
    ),
    "bench": Command(
        "compare speed, memory and learning with other models, side by side", "mmrec.bench.compare:bench"
    ),
    "fit": Command("train a model, and validate it as it learns", _TRAINING, parses=True),
    "validate": Command("score a checkpoint on the validation text", _TRAINING, parses=True),
    "test": Command("the same, under the name test/ instead of val/", _TRAINING, parses=True),
    "predict": Command("write how well each token of the validation text was predicted", _TRAINING, parses=True),
}


def run() -> None:
    """Run the command that the process was started with, and exit."""
    configure_streams()
    if {"-h", "--help"} & {*sys.argv[1:]}:
        put_off_compiler()
    status = main(sys.argv[1:])
    # Libraries answer Ctrl-C with tracebacks of what is no longer there, once Python takes itself down.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def main(args: Sequence[str]) -> int:
    """Run one command and return its exit status.

    0 where it went well, 2 after one line that says what was wrong with what was given, 130 or 143 where
    it was stopped by Ctrl-C or SIGTERM (training: after saving).
    """
    start_command()
    if not args or args[0] in ("-h", "--help"):
        return exit_status(lambda: print(_overview()))
    if args[0] == "--version":
        return exit_status(lambda: print(f"mmrec {__version__}"))
    return exit_status(lambda: _dispatch(*args))


def _overview() -> str:
    rows = "\n".join(f"  {name:<10}{command.about}" for name, command in COMMANDS.items())
    return (
        "usage: mmrec COMMAND [options]; 'mmrec COMMAND --help' says more\n\n"
        f"Train a recurrent-memory language model on your own text.\n\n{rows}\n\n"
        "First steps:\n"
        "  mmrec prepare tiny_shakespeare\n"
        "  mmrec fit --config tiny\n"
        '  mmrec generate --prompt "ROMEO:"'
    )


def _dispatch(name: str, *typed: str) -> None:
    args = list(typed)
    try:
        os.getcwd()
    except FileNotFoundError:  # which libraries meet in odd places: MKL ends the process
        raise UserError("the current folder is no longer there; change to one that is") from None
    for arg in (name, *args):
        if not is_unicode(arg):
            raise UserError(f"the argument {arg!a} is not UTF-8; give it in UTF-8, and rename a file that it names")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    configure(command.computes)
    if command.function == _TRAINING or name == "train":
        put_off_compiler()
        put_off_metrics()
        if not {"-h", "--help"} & {*args}:
            import_module("mmrec.model.ops.native.build").begin()
    function = import_function(name)
    if command.function == _TRAINING:
        function(name, args)
    elif command.parses:
        function(args)
    else:
        parser = Parser(prog=f"mmrec {name}", description=command.about)
        command.arguments(parser)
        call(function, parser, args)


def import_function(name: str) -> Callable[..., object]:
    """Return the function of the command ``name``; UserError where a package of its extra is missing."""
    command = COMMANDS[name]
    module, _, function = command.function.partition(":")
    try:
        found: Callable[..., object] = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if command.extra is None or (error.name or "").partition(".")[0] == "mmrec":
            raise
        raise UserError(
            f"no package {error.name!r}; mmrec {name} needs it: pip install 'mmrec[{command.extra}]'"
        ) from None
    return found
