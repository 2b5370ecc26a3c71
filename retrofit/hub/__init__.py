"""Between directories and models: loading, and later export, merge, push and import."""
