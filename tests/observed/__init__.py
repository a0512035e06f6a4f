"""The news example with views that let a test look into the server process."""
