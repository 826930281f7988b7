"""The worker process: one tensor-parallel rank that computes what its leader hands it, in order."""
