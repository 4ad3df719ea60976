"""Marks of parameters that the gate leaves to the acceptance tests, so that it stays short."""

import pytest


def proof(*values):
    """A parameter, or a row of parameters, of a test that runs with `-m acceptance` alone."""
    return pytest.param(*values, marks=pytest.mark.acceptance)
