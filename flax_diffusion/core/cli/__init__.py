"""From the command line and YAML files to typed options."""
