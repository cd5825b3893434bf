"""What a user hands in: a recipe, the models it names, and its data, opened."""
