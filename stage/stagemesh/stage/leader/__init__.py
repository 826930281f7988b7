"""The leader process: the stage's gRPC server, its links, and the care of its workers."""
