"""Start and stop a script: command line, log, processes, users' mistakes, signals and time limit, output folder."""
