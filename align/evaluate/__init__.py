"""Is one policy better than another, and by how much: intervals, win rates, reward accuracy, and the report."""
