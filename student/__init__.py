"""Stage two: shards -> batches -> xLSTM -> losses -> checkpoint, generation, evaluation."""
