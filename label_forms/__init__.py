"""The parts of import_labels.py: readers of the forms in which people keep labels."""
