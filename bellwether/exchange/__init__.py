"""What travels between server and clients: adapter, messages, checks, records, scores."""
