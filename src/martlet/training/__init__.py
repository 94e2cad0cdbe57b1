"""One training loop. Techniques put into it what is learned, from what loss, with what frozen."""
