"""One forward pass: documents become padded batches, hooks on the routers keep what each token was given."""
