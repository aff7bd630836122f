"""The `carousel` command."""
