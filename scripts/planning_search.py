"""Compare the plan of mmrec train with a search of 16 trainings that take as long, and add a row for each to a table.

The search changes the plan in one thing or two at a time: the model, the learning rate, what is done against
overfitting, the batches, the schedule. Time is that of the processor, so that other programs on the machine matter
less.

    python scripts/planning_search.py data/plays data/manual --seconds 60

Rows that the table holds already are not trained again. What is added to them reads as many tokens as they did; with
another model, other batches or another loss as many more or fewer as these are faster or slower than the plan's, both
tried one after the other, since what else runs on a machine changes its pace. The regret of the plan on a text is
what it needs in bits per byte above the best of the search, as a share of that.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from planning_study import (
    append,
    bits_per_byte,
    digest,
    is_there,
    row_of,
    rows,
    shape_name,
    shapes_by_name,
    table_parser,
    text_digest,
)

from mmrec.data.store import open_tokens
from mmrec.model import ModelConfig
from mmrec.planning.law import LAW
from mmrec.planning.machine import seconds_per_update
from mmrec.planning.plan import (
    Batches,
    Candidate,
    Rate,
    Text,
    TrainingPlan,
    choose_batches,
    decay_beside,
    expected_loss,
    has_second_token,
    learning_rate,
    make_plan,
    regularization,
    shapes_for,
)
from mmrec.planning.text import describe_text

COLUMNS = (
    "text",
    "text_sha256",
    "sha256",
    "train_tokens",
    "xz",
    "ngram",
    "seconds",
    "change",
    "shape",
    "parameters",
    "tokens",
    "epochs",
    "seed",
    "expected",
    "bits_per_byte",
    "taken",
    "commit",
    "processor",
)


DROPOUTS = (0.0, 0.1, 0.3)
"""Shares of dropout that are tried, with the weight decay that belongs to them."""
INSTEAD_OF_PLAN = 0.05
"""Tried in the place of the one of them that is the plan's."""


@dataclass(frozen=True)
class Arm:
    """One training of the search.

    Attributes:
        change: name for what is changed.
        config: of the model.
        batches: of its updates.
        options: of ``mmrec fit``.
        second_token: whether the token after the next one is learned, too; None for as the plan has it.
    """

    change: str
    config: ModelConfig
    batches: Batches
    options: tuple[str, ...] = ()
    second_token: bool | None = None

    @property
    def paced(self) -> tuple[ModelConfig, Batches, bool | None]:
        """What its pace depends on."""
        return self.config, self.batches, self.second_token


def arms(plan: TrainingPlan) -> Iterator[Arm]:
    """Yield the plan itself, and 16 changes of it."""
    shapes = shapes_for(plan.text)
    planned = shapes.index(plan.config)
    yield Arm("plan", plan.config, plan.batches)
    for step in (-1, 1):
        index = planned + step if 0 <= planned + step < len(shapes) else planned - 2 * step
        config = shapes[index]
        batches = choose_batches(config, plan.text.train_tokens, plan.tokens)
        for factor in (0.5, 1, 2):
            yield Arm(f"{shape_name(config)}, rate x {factor}", config, batches, (rate_option(config, factor),))
    for factor in (0.5, 2, 3):
        yield Arm(f"rate x {factor}", plan.config, plan.batches, (rate_option(plan.config, factor),))
    planned_share = regularization(plan.config, plan.tokens, plan.text.train_tokens, plan.text.vocab_size)["dropout"]
    for dropout in DROPOUTS:
        share = INSTEAD_OF_PLAN if dropout == planned_share else dropout
        decay = decay_beside(share)
        options = (f"--model.dropout={share}", f"--model.weight_decay={decay}")
        yield Arm(f"dropout {share:g}", plan.config, plan.batches, options)
    second, weight = ("no second token", 0.0) if has_second_token(plan.text) else ("second token", 0.3)
    yield Arm(second, plan.config, plan.batches, (f"--model.mtp_loss_weight={weight}",), weight > 0)
    yield Arm("cosine", plan.config, plan.batches, ("--model.schedule=cosine",))
    for name, rows_of in (("half the rows", plan.batches.rows // 2), ("twice the rows", plan.batches.rows * 2)):
        batches = replace(
            plan.batches, rows=max(1, rows_of), interleave=min(plan.batches.interleave, max(1, rows_of))
        )
        options = (f"--data.batch_size={batches.rows}", f"--data.interleave={batches.interleave}")
        yield Arm(name, plan.config, batches, options)


def rate_option(config: ModelConfig, factor: float) -> str:
    """Return the option for ``factor`` times the learning rate that a plan of the model has."""
    return f"--model.learning_rate={learning_rate(config) * factor}"


def main() -> None:
    parser = table_parser(__doc__, "docs/planning_search.csv")
    parser.add_argument("--seconds", type=float, default=60, help="of the processor, for each training")
    parser.add_argument("--changes", nargs="+", help="those trainings alone, by their name in the table")
    parser.add_argument("--curves", type=Path, help="folder for the losses on the way, a file each")
    options = parser.parse_args()
    for folder in options.data_dirs:
        for seed in options.seeds:
            search(options.table, folder, options.seconds, seed, options.changes, options.curves)
    report(options.table)


def search(
    table: Path,
    folder: Path,
    seconds: float,
    seed: int,
    changes: Sequence[str] | None = None,
    curves: Path | None = None,
) -> None:
    """Train what is not in ``table`` yet: all, or those of ``changes``; the losses on the way go into ``curves``."""
    opened = open_tokens(folder)
    text, name = describe_text(opened), digest(opened)
    trained = {row["change"]: row for row in rows(table) if (row["sha256"], row["seconds"]) == (name, f"{seconds:g}")}
    plan = planned_before(trained, text) or plan_by_trials(text, seconds)
    steps = {(plan.config, plan.batches, None): plan.steps}
    for arm in arms(plan):
        if arm.change in trained:
            steps.setdefault(arm.paced, int(trained[arm.change]["tokens"]) // arm.batches.tokens)
    for arm in arms(plan):
        key = {"sha256": name, "seconds": f"{seconds:g}", "change": arm.change, "seed": str(seed)}
        if is_there(table, key) or (changes is not None and arm.change not in changes):
            continue
        curve = curves and curves / f"{folder.name}-{arm.change.replace(' ', '_')}-{seconds:g}-{seed}.csv"
        if arm.paced not in steps:
            pace = rate(text, plan.config, plan.batches)  # now: that of the plan's own trial may have been another
            tokens = plan.tokens * rate(text, *arm.paced) / pace
            steps[arm.paced] = max(1, int(tokens / arm.batches.tokens))
        changed = replace(plan, config=arm.config, batches=arm.batches, steps=steps[arm.paced])
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        reached = bits_per_byte(folder, changed, seed, arm.options, curve)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        append(
            table,
            COLUMNS,
            key
            | row_of(folder, changed, reached)
            | {
                "text_sha256": text_digest(opened),
                "shape": shape_name(arm.config),
                "tokens": changed.tokens,
                "expected": round(changed.expected, 4) if arm.change == "plan" else "",
                "taken": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            },
        )


def rate(text: Text, config: ModelConfig, batches: Batches, second_token: bool | None = None) -> float:
    """Return the tokens that a second of the processor trains on; of the second token see :class:`Arm`."""
    return batches.tokens / seconds_per_update(
        Candidate(config, batches), text, "cpu", 3.0, time.process_time, second_token=second_token
    )


def plan_by_trials(text: Text, seconds: float) -> TrainingPlan:
    """Return the plan of a text that has no row yet."""
    candidates = [Candidate.of(config, text) for config in shapes_for(text)[:5]]
    plan = make_plan(text, [Rate(each, rate(text, each.config, each.batches)) for each in candidates], seconds)
    larger = Candidate.of(plan.config, text, plan.tokens)
    if larger.batches == plan.batches:
        return plan
    return make_plan(text, [Rate(larger, rate(text, larger.config, larger.batches))], seconds)


def planned_before(trained: dict[str, dict[str, str]], text: Text) -> TrainingPlan | None:
    """Return the plan of the row that a table has of it, since another trial would find another pace.

    None where there is none, or the plan's model is no longer one of those that a plan chooses from.
    """
    config = shapes_by_name(text).get(trained["plan"]["shape"]) if "plan" in trained else None
    if config is None:
        return None
    tokens = int(trained["plan"]["tokens"])
    batches = choose_batches(config, text.train_tokens, tokens)
    expected = expected_loss(config, text, tokens)
    return TrainingPlan(config, batches, tokens // batches.tokens, text, expected, LAW.spread)


def report(table: Path) -> None:
    """Print the regret of the plan on each text and time, with the trainings of the same commit."""
    cells: dict[tuple[str, str, str, str], list[dict[str, str]]] = {}
    for row in rows(table):
        key = row["text"], row["sha256"], row["seconds"], row["commit"].rstrip("+")
        cells.setdefault(key, []).append(row)
    for (text, _, seconds, _), found in cells.items():
        planned = [float(row["bits_per_byte"]) for row in found if row["change"] == "plan"]
        best = min(found, key=lambda row: float(row["bits_per_byte"]))
        if planned:
            regret = min(planned) / float(best["bits_per_byte"]) - 1
            print(
                f"{text:<16} {seconds:>5} s  plan {min(planned):.3f}, regret {regret:.1%} of {len(found)} trainings"
            )
            print(f"{'':<24} best {best['bits_per_byte']} ({best['change']})")


if __name__ == "__main__":
    main()
