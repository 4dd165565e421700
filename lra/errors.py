"""What can go wrong through no fault of the program."""


class UserError(Exception):
    """A mistake that the user can mend: one clear line that names the key or the path; exit code 2 in `run.py`."""
