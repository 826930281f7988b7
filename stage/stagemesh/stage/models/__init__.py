"""Models as plain torch modules over flat token batches."""
