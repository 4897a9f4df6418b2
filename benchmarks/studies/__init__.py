"""The studies behind docs/evidence.md: what trains, compares and reports, each one command; not in the wheel."""
