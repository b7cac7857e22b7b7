"""What comes next, and how well it is foretold."""
