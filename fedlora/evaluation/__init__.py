"""What a run is measured by besides its own test figures: baselines, traffic, generated text, foreign adapters."""
