"""Pure tensor functions. They know no module; shapes are in their signatures."""
