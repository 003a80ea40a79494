"""``mmrec train TEXT``: prepare, try the machine, plan, train, and say what came of it."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmrec.checkpoints import runs
from mmrec.checkpoints.checkpoint import read_checkpoint
from mmrec.core.devices import device_of_accelerator
from mmrec.core.errors import UserError
from mmrec.core.files import write_file
from mmrec.core.options import Parser
from mmrec.core.runtime import command_start
from mmrec.data.store import TokenFolder
from mmrec.planning.by_hand import PROCESSES, ROWS, STEPS, ByHand
from mmrec.planning.comparison import MOST_SCORED, comparison_seconds
from mmrec.planning.half_way import HalfWayLine
from mmrec.planning.longer import Earlier, describe
from mmrec.planning.machine import check_accelerator, measure_rates, with_processes_that_pay
from mmrec.planning.options import TrainOptions, in_place, split_arguments, value_of
from mmrec.planning.outcome import best_checkpoint, report
from mmrec.planning.plan import (
    FORWARD_SHARE,
    MOST_EXPECTED,
    SHORTEST_ROW,
    Candidate,
    Rate,
    TrainingPlan,
    fit_options,
    make_plan,
)
from mmrec.planning.record import Record, callback_state, read_intact, read_record, seconds_of, seconds_trained
from mmrec.planning.source import check_tokenizer, prepare_texts
from mmrec.planning.text import describe_text
from mmrec.training.callbacks.beginning import Beginning
from mmrec.training.callbacks.half_way import HalfWay
from mmrec.training.cli import run_lightning

STARTING = 3.0
"""Seconds that a training takes to start, and to end, beyond its updates and its validations."""
ACCELERATOR, MOST_STEPS = "--trainer.accelerator=", f"{STEPS}="
LEAST = 2.0
"""Seconds of training, however little time there is."""


def train(args: Sequence[str]) -> None:
    """Run ``mmrec train`` with ``args``; its minutes count from the start of the command.

    Raises:
        UserError: something that was given is wrong; nothing has been trained.
    """
    own, forwarded = split_arguments(args)
    parser = Parser(prog="mmrec train", description="train a model on your own text, in the minutes that you have")
    parser.add_argument("texts", nargs="+", help="name of a corpus, or files, folders and URLs of your own text")
    parser.add_argument("--plan", action="store_true", help="only say what would be done; the text is prepared")
    parser.add_class_arguments(TrainOptions, skip={"texts", "plan"})
    options = TrainOptions(**vars(parser.parse_args(own)))
    if options.run is not None:
        runs.check_name(options.run)
    check_tokenizer(options.tokenizer)
    check_accelerator(options.on)
    by_hand = ByHand(forwarded, device_of_accelerator(options.on or "auto").type)
    folders = prepare_texts(
        options.texts,
        options.tokenizer,
        options.minutes_or_default,
        options.encoding,
        options.glob,
        lambda path: _record_of(options, path) is not None,
        options.run,
        options.run not in runs.runs(Path()),
    )
    for each in folders:
        runs.check_name(_place(options, each.folder).name)
    begun = [(each, found) for each in folders if (found := _checked_record(options, each)) is not None]
    if begun:
        folder, before = begun[0]
        record, start = _go_on(before, folder, options, by_hand)
        record = _move(record, options.on)
    else:
        (folder, record), start = _begin(options, folders, by_hand), None
    where = _place(options, folder.folder)
    run = where.name
    if options.plan:
        return
    record = _fit(record, where, run, forwarded, start)
    came, said = report(run, folder, record, comparison_seconds(record.asked or options.minutes_or_default))
    print(f"\n{said}")
    # Not before: where this is stopped or killed, the same line says what came of it, instead of training on.
    replace(record, finished=True, came=came).write(where)


def _deadline(options: TrainOptions) -> float:
    """Return when the command is to end, of the monotonic clock."""
    return command_start() + 60 * options.minutes_or_default


def _seconds_left(deadline: float) -> float:
    """Return the seconds until then, :data:`LEAST` where it is over: starting takes long on a busy machine."""
    return max(LEAST, deadline - time.monotonic())


def _place(options: TrainOptions, folder: Path) -> Path:
    """Return the folder of the run that trains on the token folder ``folder``."""
    return Path(runs.LOGS, options.run or folder.resolve().name)


def _record_of(options: TrainOptions, folder: Path) -> Record | None:
    """Return the record of the training that has begun on the token folder ``folder``; None if none has.

    A plan of which there is no checkpoint is none.
    """
    where = _place(options, folder)
    record = read_record(where) if where.name in runs.runs(Path()) else None
    return record if record is not None and Path(record.data_dir).resolve() == folder.resolve() else None


def _checked_record(options: TrainOptions, tokens: TokenFolder) -> Record | None:
    """Return what :func:`_record_of` does, or raise UserError where the run of that name is another one."""
    folder = tokens.folder
    where = _place(options, folder)
    if where.name not in runs.runs(Path()):
        return None
    record = read_record(where)
    if record is None:
        raise UserError(f"the run {where.name!r} was not begun by mmrec train; choose another --run")
    if Path(record.data_dir).resolve() != folder.resolve():
        raise UserError(f"the run {where.name!r} was trained on {record.data_dir}; choose another --run")
    if record.tokens not in (None, tokens.digest):
        raise UserError(
            f"the run {where.name!r} was trained on another text than {record.data_dir} holds now; "
            f"choose another --run, or move {where} away"
        )
    return record


def _begin(options: TrainOptions, folders: Sequence[TokenFolder], by_hand: ByHand) -> tuple[TokenFolder, Record]:
    """Plan a training from nothing on the one of ``folders`` of which most is expected, and say so."""
    start, deadline = time.monotonic(), _deadline(options)
    accelerator = options.on or "auto"
    plans: list[tuple[TrainingPlan, TokenFolder]] = []
    xz: float | None = None
    for each in folders:
        if len(each.train) <= SHORTEST_ROW:
            raise UserError(
                f"the text has {len(each.train) + len(each.val)} tokens, too few to train on and to validate with; "
                "give one of a few hundred characters at least"
            )
        text = describe_text(each, xz)
        xz = text.xz  # of the same text, whatever its tokens
        candidates = by_hand.candidates(text)
        rates = measure_rates(text, candidates, _seconds_left(deadline), accelerator, by_hand.processes)
        plans.append((make_plan(text, rates, _seconds_left(deadline), most=by_hand.most_steps), each))
    plans.sort(key=lambda found: found[0].expected)
    plan, folder = plans[0]
    if len(plans) > 1:
        others = ", ".join(f"{other.expected:.2f} by {each.tokenizer.name}" for other, each in plans[1:])
        print(f"tokens      by {folder.tokenizer.name}: {plan.expected:.2f} bits/byte are expected, {others}")
    rate = Rate(Candidate(plan.config, plan.batches), plan.rate, plan.processes)
    larger = by_hand.candidate(plan.config, plan.text, plan.tokens)
    if larger != rate.candidate:
        (rate,) = measure_rates(plan.text, [larger], _seconds_left(deadline), accelerator, by_hand.processes)
    if by_hand.processes is None:
        rate = with_processes_that_pay(rate, plan.text, _seconds_left(deadline), accelerator)
    # What comes after the training: the final score, by one process, and what stands beside it.
    by_one = rate.tokens / (rate.processes * plan.batches.copies)
    ending = min(plan.text.val_tokens, MOST_SCORED) * FORWARD_SHARE / by_one + STARTING
    ending += comparison_seconds(options.minutes_or_default)
    seconds = _seconds_left(deadline - ending)
    plan = make_plan(plan.text, [rate], seconds, most=by_hand.most_steps)
    planning = time.monotonic() - start
    print(plan.describe(seconds, planning + ending))
    chosen = [*fit_options(plan), f"{ACCELERATOR}{accelerator}", *_processes(rate.processes)]
    in_time = plan
    if by_hand.most_steps(plan.batches, plan.text) is not None:
        # The trainer has that limit, and may get another one later: beside it the time is the only one.
        chosen.append(f"{MOST_STEPS}-1")
        in_time = make_plan(plan.text, [rate], seconds, most=lambda *_: sys.maxsize)
    data_dir = str(folder.folder)  # the project may be moved
    expected = min(MOST_EXPECTED, plan.expected)
    asked, tokens = options.minutes_or_default, folder.digest
    made = Record(data_dir, seconds / 60, in_time.steps, chosen, plan.text.xz, expected, asked=asked, tokens=tokens)
    return folder, made


def _go_on(before: Record, folder: TokenFolder, options: TrainOptions, by_hand: ByHand) -> tuple[Record, Path | None]:
    """Return what is left of a training that was stopped, or a longer one where it has ended, and its checkpoint.

    That is None where it is the last one.
    """
    where = _place(options, folder.folder)
    if not before.finished:
        return _resume(before, runs.find_checkpoint(Path(), where.name, runs.LAST), folder, options, by_hand), None
    stable = where / runs.CHECKPOINTS / f"{runs.STABLE}.ckpt"
    start = stable if _is_intact(stable) else runs.find_checkpoint(Path(), where.name, runs.LAST)
    best = best_checkpoint(Path(), where.name)
    try:
        ended = read_intact(best)
    except UserError as error:
        raise UserError(f"{error}; move that file away to go on without it") from None
    # The pace of another device is not known.
    earlier = None if _is_moved(before, options.on) else Earlier.of(ended, by_hand.copies, folder)
    minutes = options.minutes_or_default
    ending = STARTING + comparison_seconds(minutes)
    if earlier is not None:
        ending += earlier.scoring_seconds(by_hand.processes or int(value_of(before.options, PROCESSES[0]) or 1))
    done, more = seconds_trained(start), _seconds_left(_deadline(options) - ending)
    told = ""
    if by_hand.max_steps is not None:
        told = _told_of_limit(by_hand.max_steps, read_intact(runs.find_checkpoint(Path(), where.name, runs.LAST)))
    # Who asks for more gets it, however often the text was read.
    unbounded = in_place(before.options, [f"{MOST_STEPS}-1"])
    expected = None
    if earlier is not None:
        tokens = earlier.tokens_in(done + more, by_hand.max_steps)
        unbounded = earlier.options(unbounded, tokens)
        if before.came is not None and best.stem == runs.BEST:  # not that of one that was lost
            expected = earlier.expected(before.came, tokens)
            told += describe(before.came, expected)
    print(f"longer      {start}: {more:,.0f} more seconds of training after {done:,.0f}{told}")
    record = replace(
        before,
        minutes=(done + more) / 60,
        steps=None,
        options=unbounded,
        expected=expected or before.expected,
        finished=False,
        asked=minutes,
        half_way=None,
        reached=seconds_of(ended),
        came=None,  # until its end: the best checkpoint may be another by then
        is_of_longer=expected is not None,
    )
    return record, start if start == stable else None


def _told_of_limit(most: int, last: dict[str, Any]) -> str:
    """Return what is to be said where so many updates were made before the ``last`` checkpoint, as it was read."""
    made = last["global_step"]
    return f"; {STEPS} {most} leaves no more updates than the {made:,} that were made" if most <= made else ""


def _is_intact(checkpoint: Path) -> bool:
    """Whether training can begin from ``checkpoint``; where it is there and damaged, that is said."""
    if not checkpoint.exists():
        return False
    try:
        read_checkpoint(checkpoint, mmap=True)
    except UserError as error:
        print(f"{error}; taking {runs.LAST}.ckpt instead", file=sys.stderr)
        return False
    return True


def _had_best(last: Path) -> bool:
    """Whether the training that the checkpoint ``last`` is of kept a best one; False where it is not readable."""
    try:
        state = callback_state(read_checkpoint(last, mmap=True), "BestCheckpoint")
    except UserError:
        return False
    return bool(state.get("best_model_path"))


def _device(record: Record) -> str:
    """Return the device that ``record`` trains on, as ``--on`` names it."""
    return value_of(record.options, ACCELERATOR.removesuffix("=")) or "auto"


def _is_moved(record: Record, on: str | None) -> bool:
    """Whether ``on`` is another device than the one that ``record`` trains on, not only another name of it."""
    return on is not None and device_of_accelerator(on) != device_of_accelerator(_device(record))


def _move(record: Record, on: str | None) -> Record:
    """Return ``record`` with the device ``on``, where that is another: its pace decides how far the training goes."""
    earlier = _device(record)
    if on in (None, earlier):
        return record
    print(f"on          {on} instead of {earlier}")
    if not _is_moved(record, on):
        return replace(record, options=in_place(record.options, [f"{ACCELERATOR}{on}"]))
    options = in_place(record.options, [f"{ACCELERATOR}{on}", *_processes(1)])
    return replace(record, options=options, steps=None, is_of_longer=False)


def _processes(count: int) -> list[str]:
    """Return the options of ``mmrec fit`` by which so many processes share out the rows of an update."""
    return [f"{PROCESSES[0]}={count}", f"{PROCESSES[1]}={'cores' if count > 1 else 'auto'}"]


def _processes_for_rows(planned: Sequence[str], forwarded: Sequence[str]) -> list[str]:
    """Return options of fewer processes than ``planned`` where those cannot share out the rows given by hand."""
    devices, rows = value_of(planned, PROCESSES[0]), value_of(forwarded, ROWS)
    if devices is None or rows is None or not rows.isdecimal() or int(rows) % int(devices) == 0:
        return []
    return _processes(math.gcd(int(devices), int(rows)))


def _resume(before: Record, last: Path, folder: TokenFolder, options: TrainOptions, by_hand: ByHand) -> Record:
    """Return what is left of a training that was stopped: other minutes than before lengthen it, or shorten it."""
    stopped = read_intact(last)
    done = seconds_of(stopped)
    record, changed = before, ""
    if None not in (options.minutes, before.asked) and options.minutes != before.asked:
        assert options.minutes is not None
        assert before.asked is not None
        minutes = max(before.minutes + options.minutes - before.asked, (done + LEAST) / 60)
        changed = f"; {options.minutes:g} minutes instead of {before.asked:g}"
        planned = int(value_of(before.options, STEPS) or -1)
        most = by_hand.max_steps or (planned if planned > 0 else None)
        kept, expected, knows = before.options, before.expected, False
        earlier = None if _is_moved(before, options.on) else Earlier.of(stopped, by_hand.copies, folder)
        if earlier is not None:
            planned_tokens, tokens = (earlier.tokens_in(60 * each, most) for each in (before.minutes, minutes))
            kept = earlier.options(kept, tokens)
            knows = by_hand.max_steps is None and before.expected_is_own
            if knows:
                expected = min(MOST_EXPECTED, earlier.moved(expected, planned_tokens, tokens))
                changed += f": {expected:.2f} bits/byte are expected"
        record = replace(
            before,
            minutes=minutes,
            steps=None,
            options=kept,
            expected=expected,
            asked=options.minutes,
            half_way=None,
            is_of_longer=before.is_of_longer and knows,  # else it is that of other minutes
        )
    if by_hand.max_steps is not None:
        changed += _told_of_limit(by_hand.max_steps, stopped)
    print(f"resumed     {last}: {done:,.0f} seconds of training of {60 * record.minutes:,.0f} are done{changed}")
    return record


def _fit(record: Record, where: Path, run: str, forwarded: Sequence[str], start: Path | None) -> Record:
    """Train as ``record`` says, from ``start`` or the last checkpoint; return it with what was expected half-way."""

    def begin() -> None:
        last, best = (where / runs.CHECKPOINTS / f"{name}.ckpt" for name in (runs.LAST, runs.BEST))
        if record.reached is not None and not best.exists() and _had_best(last):
            write_file(best, last.read_bytes())  # of a training that is made longer: what it came to is kept
        if start is not None:
            write_file(last, start.read_bytes())
        record.write(where)  # after it: or what is killed between the two would go on from the end of the shorter one

    options = [f"--run={run}", f"--data.data_dir={record.data_dir}", *record.options]
    options += _processes_for_rows(record.options, forwarded)
    options.append(f"--time_limit.minutes={record.minutes:.4f}")
    # Said in either case: the config of the run that is resumed may have a number.
    options.append(f"--time_limit.planned_steps={'null' if record.steps is None else record.steps}")
    if run in runs.runs(Path()):
        options.append(f"--ckpt_path={start or runs.LAST}")
    line = HalfWayLine(record, where)
    # Of a training that is made longer more is known at its begin than half-way.
    says_half_way = record.half_way is None and not record.is_of_longer
    added = [Beginning(begin), *([HalfWay(line)] if says_half_way else [])]
    run_lightning("fit", [*options, *forwarded], f"mmrec {' '.join(map(shlex.quote, sys.argv[1:]))}", added)
    return line.record
