"""`searchrl doctor`: is this machine ready for that run? Every failed check says what to do."""
