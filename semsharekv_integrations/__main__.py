"""``python -m semsharekv_integrations`` is the command ``semsharekv``."""

from semsharekv_integrations.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
