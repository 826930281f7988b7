"""API workers: processes that tokenize, detokenize and stream, so that the scheduler's loop stays short."""
