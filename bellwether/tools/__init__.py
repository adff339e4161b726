"""Small tools that know nothing of federated learning."""
