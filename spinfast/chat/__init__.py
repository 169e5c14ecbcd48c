"""Talking to a model: in a terminal (terminal.py) and over HTTP (server.py), by one speaker (speaker.py)."""
