"""`hftasks`: one file per command. Composed of public pieces of the rooms below; nothing imports it."""
