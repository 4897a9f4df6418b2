"""Makes a precision plan from what is known of each expert and a budget."""
