"""The command line: the only file that knows all the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmrec import __version__
from mmrec.core.errors import UserError, exit_status, nearest, open_missing_streams
from mmrec.core.options import Parser, call
from mmrec.core.text_files import is_unicode

LIGHTNING_COMMANDS = {
    "fit": "train a model, and validate it as it learns",
    "validate": "score a checkpoint on the validation text",
    "test": "the same, under the name test/ instead of val/",
    "predict": "write how well each token of the validation text was predicted",
}
OTHER_COMMANDS = {
    "prepare": "turn a corpus, a file or a folder into training and validation tokens",
    "generate": "write text with a trained model",
    "read": "read a text of any length, and keep what was read in a small file",
    "score": "print how well a text is predicted, in total and by position",
    "export": "write a trained model for transformers, onnxruntime, or as one safetensors file",
    "serve": "answer requests of OpenAI's completions API, and show a page to type in",
    "eval": "measure what the memory remembers, beside other models",
    "report": "write a page about a run that opens without a network",
    "bench": "compare speed, memory and learning with other models, side by side",
}
CORPUS_HELP = (
    "tiny_shakespeare, shakespeare_plays, sample, file, directory, openwebtext, wikipedia, c4, hf:OWNER/NAME, or "
    "your own files and folders"
)
COMMANDS = OTHER_COMMANDS | LIGHTNING_COMMANDS


def run() -> None:
    """Run the command that the process was started with, and exit."""
    open_missing_streams()
    sys.exit(main(sys.argv[1:]))


def main(args: Sequence[str]) -> int:
    """Run one command and return its exit status.

    0 where it went well, 2 after one line that says what was wrong with what was given, 130 or 143 where
    it was stopped by Ctrl-C or SIGTERM (training: after saving).
    """
    if not args or args[0] in ("-h", "--help"):
        return exit_status(lambda: print(_overview()))
    if args[0] == "--version":
        return exit_status(lambda: print(f"mmrec {__version__}"))
    return exit_status(lambda: _dispatch(*args))


def _overview() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        "usage: mmrec COMMAND [options]; 'mmrec COMMAND --help' says more\n\n"
        f"Train a recurrent-memory language model on your own text.\n\n{rows}\n\n"
        "First steps:\n"
        "  mmrec prepare tiny_shakespeare\n"
        "  mmrec fit --config tiny\n"
        '  mmrec generate --prompt "ROMEO:"'
    )


def _parser(command: str) -> Parser:
    return Parser(prog=f"mmrec {command}", description=OTHER_COMMANDS[command])


def _dispatch(command: str, *options: str) -> None:
    args = list(options)
    for arg in (command, *args):
        if not is_unicode(arg):
            raise UserError(f"the argument {arg!a} is not UTF-8; rename what it names")
    match command:
        case "prepare":
            from mmrec.data.prepare import prepare

            flags = {
                "force": "replace another token folder at output_dir",
                "verify": "only check the files of output_dir",
                "drop_duplicates": "keep one of several documents with the same text (large corpora)",
            }
            parser = _parser(command)
            parser.add_argument("corpus", nargs="?", help=CORPUS_HELP)
            parser.add_argument("paths", nargs="*", help="files and folders, for a large corpus")
            for flag, about in flags.items():
                parser.add_argument(f"--{flag}", action="store_true", help=about)
            call(prepare, parser, args)
        case "generate":
            from mmrec.inference.generate import generate

            call(generate, _parser(command), args)
        case "read" | "score":
            from mmrec.inference import scoring as reading

            parser = _parser(command)
            parser.add_argument("file", help="a UTF-8 text, or - for standard input")
            call(getattr(reading, command), parser, args)
        case "export":
            from mmrec.export.command import export

            parser = _parser(command)
            parser.add_argument("--force", action="store_true", help="replace another export at output_dir")
            call(export, parser, args)
        case "report":
            from mmrec.report.page import report

            parser = _parser(command)
            parser.add_argument("run", help="name of a run in lightning_logs, or its folder")
            call(report, parser, args)
        case "serve":
            try:
                from mmrec.serve.command import serve
            except ModuleNotFoundError as error:
                raise UserError(f"no package {error.name!r}; serving needs it: pip install 'mmrec[serve]'") from None

            call(serve, _parser(command), args)
        case "bench":
            from mmrec.bench.compare import bench

            call(bench, _parser(command), args)
        case "eval":
            from mmrec.evals.command import evaluate

            evaluate(args)
        case _ if command in LIGHTNING_COMMANDS:
            from mmrec.training.cli import run_lightning

            run_lightning(command, args)
        case _:
            raise UserError(f"unknown command {command!r}; known: {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
