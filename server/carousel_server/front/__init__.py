"""The front doors: they decode, authorise and answer; all else is the engine's."""
