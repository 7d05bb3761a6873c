"""What a person reads after a run: the HTML report and the model card."""
