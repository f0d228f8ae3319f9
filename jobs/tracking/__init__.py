"""MLflow: runs, their metrics not yet accepted by MLflow, and the registry with its champions."""
