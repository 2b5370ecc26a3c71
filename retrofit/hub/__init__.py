"""Between a run and the Hub."""
