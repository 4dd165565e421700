"""The benchmark: tasks, data, model, training of one cell, records and tables."""
