"""A run from the driver's side: trained, evaluated, exported, registered; its directory, its record, its tables."""
