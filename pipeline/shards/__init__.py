"""Sequence shards: what a data set is on disk, how it is read and written, and the vocabulary of its rows."""
