"""What benchmarks measure on, and what they hold beside each other: models, images, ways. Nobody runs these."""
