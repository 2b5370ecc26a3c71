"""Text in, prepared tokens out: sources, templates, the memory-mapped token store, and the demo's maze."""
