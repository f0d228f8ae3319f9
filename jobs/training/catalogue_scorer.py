"""The scores of a whole catalogue for requests: what does not depend on the request is computed once, what does not
depend on the candidate once per request."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jobs.training.catalogue import Catalogue
from jobs.training.model import ItemRows, catalogue_input, user_codes
from models.attention_tower import EncodedItems, HistoryTower
from models.interface import Recommender, refuse_bad_rows
from models.prior import PriorAlone, PriorModel, bare_tower
from models.repeats import SeenItems
from models.sequence_tower import SequenceModel, Vectors
from pipeline.batches.batch import Batch
from pipeline.shards.vocabulary import NUM_RESERVED

CANDIDATES_PER_FORWARD = 1 << 17
"""Limits the memory of one forward: about 1 KB per candidate at width 64."""
BLOCK_ITEMS, BLOCK_CANDIDATES = 1 << 10, 1 << 14
"""Where each candidate is scored by itself: items of a block, and candidates of a forward."""
SCORES_PER_FORWARD = 1 << 21
"""The same limit for models whose score is an inner product."""
LOOK_UP_ROWS = 1 << 16


class CatalogueScorer:
    """Scores every item of a catalogue for requests. All methods are collectives."""

    def __init__(self, model: nn.Module, tables: ItemRows, catalogue: Catalogue) -> None:
        self._model, self._tables, self._catalogue = model, tables, catalogue
        self._item_IC, self._features_IFC = _look_up_catalogue(tables, catalogue.num_items)
        refuse_bad_rows(self._item_IC, self._features_IFC)
        self._items: EncodedItems | None = None
        tower = bare_tower(model)
        if isinstance(tower, SequenceModel):
            self._score, candidates = self._by_vectors, SCORES_PER_FORWARD // catalogue.num_items
        elif isinstance(tower, HistoryTower) and not tower.scores_sets:
            self._score, candidates = self._by_blocks, BLOCK_CANDIDATES // BLOCK_ITEMS
        else:
            self._score, candidates = self._at_once, CANDIDATES_PER_FORWARD // catalogue.num_items
        self.requests_at_once = max(1, candidates)
        """Number of requests whose scores fit the memory of one forward."""

    def scores(self, batch: Batch) -> Tensor:
        """[B, I] on the CPU: the score of every item for every request; of items that are not ranked any number. Looks
        up the users' rows only."""
        _, _, user_features_UGC = self._tables.look_up_with_users(torch.zeros(0, dtype=torch.int64), user_codes(batch))
        return self._score(batch, (self._item_IC, self._features_IFC, user_features_UGC)).cpu()

    def _by_vectors(self, batch: Batch, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Of models whose score is an inner product."""
        inputs = catalogue_input(batch, *rows)
        vectors: Vectors = self._model(inputs, vectors=True)
        scores_BI = vectors.state_BD @ vectors.vector_ID.mT
        if vectors.repeat_1 is not None:
            scores_BI += vectors.repeat_1 * SeenItems.of_requests(inputs).before(slice(None))
        if vectors.level_1 is not None:
            scores_BI += vectors.level_1
        if isinstance(self._model, PriorModel):
            offered = catalogue_input(batch, *rows, candidates=range(self._catalogue.num_items))
            scores_BI += PriorAlone(self._model)(offered).view_as(scores_BI)
        return scores_BI

    def _by_blocks(self, batch: Batch, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Of towers that score each candidate by itself: all requests with one block of items after the other, which
        stays in the processor's cache."""
        encoded = self._model(catalogue_input(batch, *rows), items=self._items, encode=True)
        self._items = encoded.items
        scores_BI = encoded.items.item_ID.new_zeros(batch.num_requests, self._catalogue.num_items, dtype=torch.float32)
        for first in range(NUM_RESERVED, self._catalogue.num_items, BLOCK_ITEMS):
            last = min(first + BLOCK_ITEMS, self._catalogue.num_items)
            inputs = catalogue_input(batch, *rows, candidates=range(first, last))
            logit_M = self._model(inputs, items=encoded.items, history=encoded.history)
            scores_BI[:, first:last] = logit_M.view(batch.num_requests, last - first)
        return scores_BI

    def _at_once(self, batch: Batch, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Of all other towers. Where candidates attend to each other, the set is exactly what is ranked, as in `solar
        score`."""
        tower = bare_tower(self._model)
        sets = isinstance(tower, Recommender) and tower.scores_sets
        offered_BI = self._catalogue.ranked(batch.request_time, all_times=not sets)
        scores_BI = torch.full(offered_BI.shape, -torch.inf)
        scores_BI[offered_BI] = self._model(catalogue_input(batch, *rows, candidates=offered_BI)).cpu()
        return scores_BI


def _look_up_catalogue(tables: ItemRows, num_items: int) -> tuple[Tensor, Tensor]:
    """(item_IC, features_IFC) of all items, on every rank. A collective."""
    parts = [
        tables.look_up(torch.arange(first, min(first + LOOK_UP_ROWS, num_items)))
        for first in range(0, num_items, LOOK_UP_ROWS)
    ]
    return torch.cat([item for item, _ in parts]), torch.cat([features for _, features in parts])
