"""What computes a step: slot state, the batch made of it, and the engine that runs the batch."""
