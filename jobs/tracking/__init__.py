"""MLflow: runs, what it has not yet accepted of them, and the registry with its champions."""
