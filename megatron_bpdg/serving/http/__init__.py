"""Servers as machines see them: calls, patience, failover and processes. What the answers say is `serving/sglang`'s."""
