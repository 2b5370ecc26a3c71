"""What lies on disk: checkpoints that are whole or absent, adapters, and loading whatever a path or Hub id names."""
