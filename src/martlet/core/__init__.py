"""The contract. Imports no technique, no engine and no host library."""
