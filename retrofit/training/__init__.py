"""The training room: start, engine, loop, checkpoints and the run directory."""
