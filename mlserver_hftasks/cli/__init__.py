"""The command `hftasks`."""
