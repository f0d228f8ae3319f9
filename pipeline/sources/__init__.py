"""Public formats -> event log: one module per format; event_log.py writes the log for all of them."""
