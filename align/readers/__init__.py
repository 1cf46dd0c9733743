"""Public formats -> our rows: `reading.read` takes files, `formats.FORMATS` says who reads which."""
