"""Programs that turn rows into outputs: a contract (`base`) and one file per backend."""
