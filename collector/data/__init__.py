"""Documents: where they come from, how files are read, and the plan that cuts them into shards."""
