"""Public formats -> event log: one file a format, all written by event_log.py."""
