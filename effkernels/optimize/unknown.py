"""The error for a module or a function that is not what was looked for."""

from __future__ import annotations


class Unknown(Exception):
    """A module or function is not what was looked for; the message says why, as in a report."""
