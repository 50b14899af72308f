"""The parts of import_labels.py: readers of label formats."""
