"""The page on which people review proposals."""
