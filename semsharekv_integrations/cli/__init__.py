"""The ``semsharekv`` command: arguments in, lines of at most 80 columns or JSON out.

It calls the engine, the frameworks' classes and the lab; of these only the lab knows it, and only ``terminal``.
``main`` imports the module of a command when that command runs, so ``--help`` stays fast.
"""
