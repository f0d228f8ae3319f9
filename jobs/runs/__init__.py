"""What the driver does with a run: train, evaluate, export, register it; its directory, its record, its tables."""
