"""Parsing of the command line and of YAML files to typed options."""
