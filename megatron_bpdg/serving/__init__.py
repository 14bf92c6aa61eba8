"""Everything that talks to inference servers over HTTP."""
