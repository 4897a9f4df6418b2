"""What training shows of each expert: router norms, loads, curvature, and the files they are kept in."""
