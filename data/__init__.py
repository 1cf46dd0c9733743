"""Data of the project: formats in README.md, the embedded world in world/."""
