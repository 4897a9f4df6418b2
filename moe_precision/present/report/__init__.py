"""A run as one HTML page: what is found in its folder, what is drawn of it, and the page."""
