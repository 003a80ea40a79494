"""``mmrec eval NAME``: the evaluations by name."""

from __future__ import annotations

from collections.abc import Callable

from mmrec.core.errors import UserError, nearest
from mmrec.core.options import Parser, call
from mmrec.evals.carry import carry
from mmrec.evals.context import context
from mmrec.evals.length import length
from mmrec.evals.planted import planted
from mmrec.evals.recipes import SMALL
from mmrec.evals.synthetic import SyntheticOptions, evaluate_synthetic

OF_CHECKPOINTS: dict[str, tuple[Callable[..., None], str]] = {
    "length": (length, "loss of the same text with up to a million tokens read before it"),
    "carry": (carry, "loss with the state reset at every window, carried, and with weights that learn"),
    "context": (context, "loss of whole books, with more and more of the book read before"),
    "planted": (planted, "share of a phrase that is known again when it comes back after other text"),
}


def evaluate(args: list[str]) -> None:
    """Run ``mmrec eval`` with ``args``; UserError where there is no such evaluation."""
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return
    name, *options = args
    if name in OF_CHECKPOINTS:
        function, about = OF_CHECKPOINTS[name]
        parser = Parser(prog=f"mmrec eval {name}", description=about)
        call(function, parser, options)
    elif name in SMALL:
        parser = Parser(prog=f"mmrec eval {name}", description=_about(name))
        parser.add_class_arguments(SyntheticOptions)
        evaluate_synthetic(name, SyntheticOptions(**vars(parser.parse_args(options))))
    else:
        known = [*OF_CHECKPOINTS, *SMALL]
        raise UserError(f"no evaluation {name!r}; known: {', '.join(known)}{nearest(name, known)}")


def _about(name: str) -> str:
    return SMALL[name].task().about


def overview() -> str:
    """Return the evaluations, a line each."""
    rows = [(name, about) for name, (_, about) in OF_CHECKPOINTS.items()]
    rows += [(name, f"synthetic task: {_about(name)}") for name in SMALL]
    lines = "\n".join(f"  {name:<11}{about}" for name, about in rows)
    return f"usage: mmrec eval NAME [options]; 'mmrec eval NAME --help' says more\n\n{lines}"
