"""Runs nights at the times of a cron expression: here in the foreground, or by manifests for Kubernetes and KubeRay."""
