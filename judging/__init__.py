"""What is said of a model by running it on a file: scores of rows."""
