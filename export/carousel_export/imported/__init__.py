"""Models that are files: made by somebody else, with their state as inputs and outputs, and no Python class."""
