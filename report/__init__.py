"""What a run shows a reader: the end table, curves, trackers."""
