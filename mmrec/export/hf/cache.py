"""The state of a model, in the place of transformers' cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmrec.model import State


class StateCache:
    """The state of B texts; its size does not depend on how much has been read.

    A loop of one's own::

        cache = StateCache()
        for ids in parts:
            output = model(ids, past_key_values=cache)  # changes it

    Attributes:
        state: as :meth:`~mmrec.model.RecurrentLM.forward` returns it; None before the first token.
        hidden: [B, D], what the logits after the last token are computed from; None before the first token.
        length: tokens that were read, padding too.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.state: State | None = None
        self.hidden: Tensor | None = None
        self.length = 0

    @property
    def rows(self) -> int | None:
        """The number of texts, B; None before the first token."""
        return None if self.hidden is None else len(self.hidden)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens of the input are in the state."""
        return self.length

    def reset(self) -> None:
        """Forget all that was read."""
        self.state, self.hidden, self.length = None, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on from the rows ``beam_idx`` [B], as beam search does."""
        self._map(lambda x: x[beam_idx.to(x.device)])

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on from each row ``repeats`` times, as several sequences of one prompt do."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> None:
        """Raise ValueError: a state cannot be taken back to an earlier token."""
        raise ValueError("a StateCache cannot be cropped: what was read cannot be taken out of the state again")

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None and self.hidden is not None:
            self.state = [(change(past), change(memory)) for past, memory in self.state]
            self.hidden = change(self.hidden)
