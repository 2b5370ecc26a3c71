"""The way to the Hub: merging, folders that load without this package, their card, and pushing them."""
