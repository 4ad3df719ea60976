"""What a run pushes to the Hugging Face Hub while it trains. It knows no framework."""
