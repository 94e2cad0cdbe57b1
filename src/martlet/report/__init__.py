"""What a report says, for people: one HTML page, and a table for the terminal."""
