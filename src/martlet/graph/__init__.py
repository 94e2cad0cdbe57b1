"""The traced graph: how it is made, looked at, measured and rewritten. Every library's model looks the same here."""
