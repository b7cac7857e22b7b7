"""Processes, atomic files, and resumable parts: what every command that works file by file stands on."""
