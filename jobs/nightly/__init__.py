"""Nightly retraining: one night from the day's log to a better champion or a reasoned refusal."""
