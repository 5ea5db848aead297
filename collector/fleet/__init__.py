"""Many replicas on a Ray cluster: the dispatcher hands out shards, and carries on when replicas or nodes die."""
