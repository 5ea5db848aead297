"""Many replicas: Ray places them, the dispatcher hands out shards and survives whatever dies."""
