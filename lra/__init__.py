<<<<<<< HEAD
"""The benchmark: tasks, data, model, training of one cell, records and tables."""
=======
"""The benchmark: tasks, data, model, training, records and tables of the Long Range Arena."""
>>>>>>> e1cb1a9 (Add Cell, its directory and the atomic record write; copy the published tables)
