"""The Lightning shell: the module, what a run has done, and what decides its results."""
