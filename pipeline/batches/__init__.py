"""Sequence shards -> batches: which requests exist, what is drawn for them, in which order and on which rank."""
