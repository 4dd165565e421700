"""Linear log-normal attention."""
