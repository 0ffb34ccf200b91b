"""Image sources to pixels to features."""
