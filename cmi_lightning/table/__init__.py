"""The paper's table as a command."""
