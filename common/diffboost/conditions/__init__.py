"""What guides the generator: edges and prompts."""
