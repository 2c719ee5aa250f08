"""`InputError`: what was given cannot be taken."""


class InputError(ValueError):
    """Bad input, told in one sentence: what was given, what is needed, what to change. All else that is raised is our fault."""
