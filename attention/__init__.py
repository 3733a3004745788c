"""What attention keeps between tokens."""
