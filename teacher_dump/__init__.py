"""Stage one: corpus -> packing -> engine -> capture -> shards."""
