"""A table's results as pages: HTML, Markdown, LaTeX and CSV."""
