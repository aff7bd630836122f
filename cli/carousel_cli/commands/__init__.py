"""The subcommands, a module each; what an extra provides is imported when one runs."""
