"""What a report is made of: its parts, its charts, its words, and the template that puts them on a page."""
