"""All code for Ray: sessions, worker groups and their failures, actor pools, submitted jobs. Imports no RunConfig."""
