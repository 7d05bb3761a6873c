"""Model and image to arrays that show what the model sees, and then to pictures."""
