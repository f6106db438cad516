"""`TokenLoader`: batches of a corpus in a random order, whose position is a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from vtok_fast.corpus.dataset import TokenDataset
from vtok_fast.corpus.order import Order

AHEAD = 1 << 16  # positions that are put in order at once


class TokenLoader:
    """Batches of clips for one of `ranks` trainers.

        loader = TokenLoader(TokenDataset("tokens"), batch_size=8, rank=0, ranks=2)
        for clips in loader:
            train(clips)
            save(loader.state_dict())

    An epoch is all clips in an order that (seed, epoch) decides. The ranks share what is left of it: step by
    step, each takes the next batch_size of the next ranks * batch_size. The position, (epoch, clips delivered
    to all ranks), says all there is to know, so a run goes on exactly with another number of ranks, workers
    or clips in a batch. A clip counts as delivered once the loop has it: what workers read ahead does not.

    Where not ranks * batch_size clips are left of the last epoch, the ranks share them evenly, and the last
    ranks may get fewer or none: trainers that wait for one another count steps, and leave `epochs` out.

    Args:
        dataset: the corpus.
        batch_size: clips of each batch.
        seed: of the order.
        rank, ranks: which trainer this is, of how many. They must all have the same arguments, and take the
            same number of steps between `state_dict` and `load_state_dict`.
        epochs: how many there are; batches run across their ends. None: without end.
        collate: what makes a batch of a list of `TokenClip`. None: the list itself.
        options: of `torch.utils.data.DataLoader`: num_workers, pin_memory, multiprocessing_context and so on.

    Raises ValueError for an impossible number.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        epochs: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ):
        for name, value in (("batch_size", batch_size), ("ranks", ranks), ("epochs", epochs or 1)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank={rank}: must be 0 to {ranks - 1}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.ranks, self.epochs = rank, ranks, epochs
        self.collate, self.options = collate or _as_they_are, options
        self.epoch = self.delivered = 0

    def state_dict(self) -> dict[str, Any]:
        """The position, and the corpus that it is of; JSON values only."""
        return {
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "delivered": self.delivered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position, whatever ranks, workers and batch size it was saved with. The seed is its own.

        Raises ValueError for the position of another corpus, or an impossible one.
        """
        if state["fingerprint"] != self.dataset.fingerprint:
            raise ValueError(
                f"state: of another corpus ({state['fingerprint'][:12]}) than {self.dataset.folder} "
                f"({self.dataset.fingerprint[:12]})"
            )
        if state["epoch"] < 0 or not 0 <= state["delivered"] < len(self.dataset):
            raise ValueError(f"state: epoch {state['epoch']}, {state['delivered']} delivered")
        self.seed, self.epoch, self.delivered = state["seed"], state["epoch"], state["delivered"]

    def steps(self) -> Iterator[tuple[list[int], int]]:
        """From the position on: (clips of this rank's batch, clips of all ranks' batches)."""
        clips, whole = len(self.dataset), self.ranks * self.batch_size
        stream = _stream(clips, self.seed, self.epoch, self.delivered)
        total = None if self.epochs is None else self.epochs * clips - self.epoch * clips - self.delivered
        while total is None or total > 0:
            count = whole if total is None else min(whole, total)
            taken = [next(stream) for _ in range(count)]
            share, more = divmod(count, self.ranks)
            first = self.rank * share + min(self.rank, more)
            yield taken[first : first + share + (self.rank < more)], count
            if total is not None:
                total -= count

    def __iter__(self) -> Iterator[Any]:
        counts: list[int] = []  # of the batches that were asked for and have not come yet

        def batches() -> Iterator[list[int]]:
            for batch, count in self.steps():
                counts.append(count)
                if batch:
                    yield batch

        loader: Any = DataLoader(
            self.dataset, batch_sampler=batches(), collate_fn=self.collate, **self.options
        )
        for batch in loader:
            self._advance(counts.pop(0))
            yield batch
        self._advance(sum(counts))  # a last step that had nothing for this rank

    def _advance(self, clips: int) -> None:
        epochs, self.delivered = divmod(self.delivered + clips, len(self.dataset))
        self.epoch += epochs


def _as_they_are(clips: list[Any]) -> list[Any]:
    return clips


def _stream(clips: int, seed: int, epoch: int, delivered: int) -> Iterator[int]:
    """The clips in order, from a position on, epoch after epoch."""
    while True:
        order = Order(clips, seed, epoch)
        for start in range(delivered, clips, AHEAD):
            yield from order(np.arange(start, min(start + AHEAD, clips))).tolist()
        epoch, delivered = epoch + 1, 0
