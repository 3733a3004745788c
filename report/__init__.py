"""What a run shows a reader and leaves for other programs: progress, the end table, curves, the
model card, trackers, folders that load elsewhere.
"""
