"""Pictures and text of what models write."""
