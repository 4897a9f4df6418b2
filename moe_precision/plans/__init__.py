"""The precision plan: a width for every expert, as a value and as a file."""
