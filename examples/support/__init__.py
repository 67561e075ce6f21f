"""What an example needs besides training: starting the ranks, reading text, and showing what happened."""
