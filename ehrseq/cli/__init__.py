"""The `ehrseq` command, one file a group of commands."""
