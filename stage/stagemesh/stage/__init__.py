"""The stage service: a leader process that speaks gRPC, and a worker process for each tensor-parallel rank."""
