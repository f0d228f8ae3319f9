"""Everything of Ray: sessions, worker groups and their failures, actor pools, submitted jobs. Knows no RunConfig."""
