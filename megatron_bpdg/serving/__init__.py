"""Everything that talks to inference servers over HTTP: SGLang 0.5.23 and newer."""
