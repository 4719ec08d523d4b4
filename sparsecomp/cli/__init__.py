"""The command line: one file per verb. Parses arguments, calls the public API, prints; it decides nothing itself."""
