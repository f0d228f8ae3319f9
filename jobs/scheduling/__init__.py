"""Nights on a cron expression: here in the foreground, or as manifests for Kubernetes and KubeRay."""
