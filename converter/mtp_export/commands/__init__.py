"""One module a command, each with its click `command`; imported only when it is called."""
