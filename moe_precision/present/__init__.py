"""Results for people: tables, figures, and what Weights & Biases gets."""
