"""The configuration: pure parsing and checking of what the user wrote, before anything is started."""
