"""Sequence shards -> batches: which requests exist, which negatives they get, in which order and on which rank."""
