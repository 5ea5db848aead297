"""Care for a run on disk: verify every record, and remove files that no commit names."""
