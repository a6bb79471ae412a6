"""Scripts that the interpreters of the other libraries run; numpy is all that is imported when they are read."""
