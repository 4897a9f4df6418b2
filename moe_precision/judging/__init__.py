"""What quantizing costs: losses on text, plans put into a live model, and methods compared on it."""
