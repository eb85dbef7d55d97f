"""Command line programs: one module a command, each with main() -> exit code."""
