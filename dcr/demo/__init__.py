"""The embedded corpus, and the command that shows on it what DCR is for."""
