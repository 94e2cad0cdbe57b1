"""Training that costs less, or generalizes further, than plain steps on labels."""
