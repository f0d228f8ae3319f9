"""The steps that create and change a data set: ingest, compaction, forgetting, garbage collection; ../build.py runs
them on Ray."""
