"""Raw interaction logs -> event log -> sequence shards -> batches. Start reading at build.py."""
