"""Export formats: how graphs are traced, converted and written as files."""
