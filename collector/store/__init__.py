"""The run directory: its tables, the atomic commit of a shard, local folders and object storage."""
