"""The way to the Hub: adapters merged into their base, and folders that load without this package."""
