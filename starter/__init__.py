"""The embedded world and base model, and the code that makes them."""
