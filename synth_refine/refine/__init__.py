"""From features, logits, given labels and synthetic features to a decision. Knows no files, images or folders."""
