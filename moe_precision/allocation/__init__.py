"""From what is known of each expert and a budget to a precision plan."""
