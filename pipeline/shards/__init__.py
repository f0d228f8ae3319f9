"""Sequence shards: the files of a data set, how they are read and written, and the vocabulary of its rows."""

from pipeline.shards.dataset import Shards as Shards
