"""``mmrec eval planted``: how much of a phrase is known again, when it comes back after more and more other text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmrec.checkpoints.loading import load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.core.errors import UserError
from mmrec.data.store import open_tokens_for
from mmrec.evals.report import print_table, save, save_plot
from mmrec.evals.retention import retention
from mmrec.inference.metrics import token_nll
from mmrec.model import RecurrentLM, State

CHUNK = 256
"""Tokens of each row that are read at a time."""
AFTER, READ = (1, 16, 64, 256, 1024), 4096
"""Tokens after which associations are followed, and how many tokens they are written in."""
KINDS = {"text": "phrases of the text", "shuffled": "the same, their tokens shuffled"}


class Planted(NamedTuple):
    """Rows of text with a phrase for each.

    Attributes:
        text: [B, T], int64: what is read before and between.
        phrases: [B, L], int64: the phrase that is read first, and comes back.
        others: [B, L], int64: what the control reads in the place of the first.
    """

    text: Tensor
    phrases: Tensor
    others: Tensor


@dataclass(frozen=True)
class PlantedOptions:
    """Which phrases are planted, and where.

    Args:
        data_dir: token folder that the model was trained on; rows and phrases are of its validation text.
        distances: tokens from the beginning of a phrase to where it comes back.
        phrase: tokens of a phrase.
        cue: its first tokens, which are not scored: from them on the rest could be known.
        rows: phrases, each planted into another place of the text.
        lead: tokens read before the phrase.
        seed: of places and phrases.
        output_dir: folder for planted.json and planted.png.

    Raises:
        UserError: a number is too small.
    """

    data_dir: Path = Path("data/shakespeare_plays")
    distances: Sequence[int] = (64, 256, 1024, 4096, 16384, 65536)
    phrase: int = 32
    cue: int = 8
    rows: int = 32
    lead: int = 256
    seed: int = 0
    output_dir: Path = Path("eval")

    def __post_init__(self) -> None:
        if not 1 <= self.cue < self.phrase:
            raise UserError(f"--cue is {self.cue}; it must be at least 1, and below --phrase, which is {self.phrase}")
        if not self.distances or min(self.distances) < self.phrase:
            raise UserError(f"--distances are numbers of at least --phrase, which is {self.phrase}")
        if self.rows < 2 or self.lead < 1 or self.seed < 0:
            raise UserError("--rows has to be at least 2, --lead at least 1, and --seed at least 0")

    def plant(self, text: np.ndarray, shuffled: bool) -> Planted:
        """Return rows of ``text`` and phrases, the same for a seed; UserError where the text is too short."""
        length = self.lead + max(self.distances) - self.phrase
        if len(text) <= length + self.phrase:
            raise UserError(
                f"{self.data_dir}: the validation text has {len(text):,} tokens; these --distances need more than "
                f"{length + self.phrase:,}: prepare a longer one (--val_split), or give lower --distances"
            )
        random = np.random.default_rng(self.seed)
        # Rows begin evenly over the text, which is a ring; a phrase is of what its row does not read, where there is.
        begins = np.arange(self.rows) * (len(text) // self.rows)
        unread = max(1, len(text) - length - self.phrase)
        rows = text[(begins[:, None] + np.arange(length)) % len(text)]
        places = (begins + length)[:, None] + random.integers(unread, size=(self.rows, 2))
        pairs = text[(places[..., None] + np.arange(self.phrase)) % len(text)]
        if shuffled:
            pairs = random.permuted(pairs, axis=-1)
        found = (torch.from_numpy(part.astype(np.int64)) for part in (rows, pairs[:, 0], pairs[:, 1]))
        return Planted(*found)


@torch.inference_mode()
def nll_on_return(net: RecurrentLM, planted: Planted, lead: int, distances: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the NLL of each phrase where it comes back, with and without having been read, in nats.

    The state is kept at each distance and goes on without the phrase: one pass serves all distances.

    Args:
        net: in evaluation mode.
        planted: rows and phrases.
        lead: tokens that are read before the phrase.
        distances: from the beginning of a phrase to its return, rising.

    Returns:
        [distances, B, L - 1] both: of all tokens of a phrase but its first.
    """
    rows, size = planted.phrases.shape
    planted = Planted(*(part.to(net.embedding.weight.device) for part in planted))
    both = torch.cat([planted.text, planted.text])
    first = torch.cat([planted.phrases, planted.others])
    again = torch.cat([planted.phrases, planted.phrases])
    state = _read(net, torch.cat([both[:, :lead], first], dim=1), net.zero_state(2 * rows))
    found, at = [], lead
    for distance in tqdm(distances, desc="distances", disable=not sys.stderr.isatty()):
        until = lead + distance - size
        state = _read(net, both[:, at:until], state)
        at = until
        logits, _ = net(again[:, :-1], state)
        found.append(token_nll(logits, again[:, 1:]).view(2, rows, -1))
    known, unknown = torch.stack(found, dim=1).cpu().double()
    return known, unknown


def _read(net: RecurrentLM, tokens: Tensor, state: State) -> State:
    """Return the state after tokens [B, T]."""
    for begin in range(0, tokens.shape[1], CHUNK):
        _, state = net.hidden(tokens[:, begin : begin + CHUNK], state)
    return state


def planted(checkpoint: CheckpointOptions, options: PlantedOptions) -> None:
    """Plant phrases into held-out text, and score them where they come back.

    Raises:
        UserError: there is no such checkpoint, or the text is too short or of other tokens.
    """
    trained = load_chosen(checkpoint)
    text = np.asarray(open_tokens_for(options.data_dir, trained.tokenizer).val)
    distances = sorted(set(options.distances))
    results = {}
    for kind in KINDS:
        rows = options.plant(text, kind == "shuffled")
        known, unknown = nll_on_return(trained.net, rows, options.lead, distances)
        results[kind] = gains(known[:, :, options.cue - 1 :], unknown[:, :, options.cue - 1 :])
    show(results, distances, options)
    read = text[: max(AFTER) + READ]
    after = [distance for distance in AFTER if 2 * distance < len(read)]
    kept = retention(trained.net, torch.from_numpy(read.astype(np.int64)), after) if after else {}
    show_retention(kept, after)
    settings = {name: getattr(options, name) for name in ("phrase", "cue", "rows", "lead", "seed")}
    save(
        options.output_dir / "planted.json",
        settings | {"distances": distances, "kinds": results} | {"retention": {"distances": after, "heads": kept}},
    )
    save_plot(options.output_dir / "planted.png", lambda axes: _draw(axes, results, distances))


def gains(known: Tensor, unknown: Tensor) -> dict[str, list[float]]:
    """Return, at each distance, what of the NLL [distances, B, scored tokens] having read the phrase before takes.

    Returns:
        ``possible``: the mean NLL of a phrase's scored tokens where it was not read before, in nats; ``gained``: how
        much less it is where it was; ``share``: the one over the other; ``error``: the standard error of ``share``.
    """
    possible, gained = unknown.sum(-1), (unknown - known).sum(-1)
    share = gained.mean(1) / possible.mean(1)
    rest = gained - share[:, None] * possible  # of a ratio of means
    error = rest.std(1) / possible.mean(1) / possible.shape[1] ** 0.5
    found = {"possible": possible.mean(1), "gained": gained.mean(1), "share": share, "error": error}
    return {name: values.tolist() for name, values in found.items()}


def show(results: dict[str, dict[str, list[float]]], distances: Sequence[int], options: PlantedOptions) -> None:
    """Print what is possible and what is gained, by kind of phrase and distance."""
    rows = []
    for kind, found in results.items():
        for number, distance in enumerate(distances):
            possible, gained, share, error = (values[number] for values in found.values())
            figures = [f"{possible:.2f}", f"{gained:+.2f}", f"{100 * share:+.1f}", f"{100 * error:.1f}"]
            rows.append([KINDS[kind], f"{distance:,}", *figures])
    title = f"{options.rows} phrases of {options.phrase} tokens, scored from their token {options.cue + 1} on"
    print_table(title, ["phrases", "distance", "nats, possible", "gained", "%", "standard error"], rows)


def show_retention(kept: dict[str, dict[str, Any]], distances: Sequence[int]) -> None:
    """Print what is left of the associations of each long layer's heads, where there is a long layer."""
    rows = []
    for name, found in kept.items():
        for kind, values in (("decays alone", found["left_by_decay"]), ("decays and writes", found["left"])):
            rows.append([name, f"{found['keys']:.1f}", kind, *(f"{100 * value:.1f}" for value in values)])
    if rows:
        head = ["block.head", "directions of keys", "after", *(f"{distance:,}" for distance in distances)]
        print_table("of an association of a long layer is left, %, after so many tokens", head, rows)


def _draw(axes: Any, results: dict[str, dict[str, list[float]]], distances: Sequence[int]) -> None:
    for kind, found in results.items():
        share, error = ([100 * x for x in found[name]] for name in ("share", "error"))
        axes.errorbar(distances, share, error, marker="o", label=KINDS[kind])
    axes.set(xscale="log", xlabel="tokens from a phrase to its return", ylabel="share of the possible gain, %")
