"""Talking to finished folders and judging them: who can be asked, the terminal, the page, the judge."""
