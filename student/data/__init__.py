"""From shards to batches: row groups read ahead, in an order that seed and epoch decide, as one tensor a column."""
