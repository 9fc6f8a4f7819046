"""The ``semsharekv`` command: one module a command, which imports what is heavy once it runs."""
