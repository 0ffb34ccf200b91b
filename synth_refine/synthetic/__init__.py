"""Class names to synthetic images."""
