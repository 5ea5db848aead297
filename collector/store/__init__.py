"""The run directory: its tables, the commit of a shard, and the stores that hold it (folders, object stores)."""
