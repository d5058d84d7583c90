"""A virtual clock around the scheduler: what an engine would do, without the engine."""
