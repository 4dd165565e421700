"""The harness: tasks, data, model, training, results, report."""
