"""The router: the public service, the scheduler and the lanes it drives. It needs no torch."""
