"""Reading sources, rendering prompts, dealing rows to clients, tokenising them."""
