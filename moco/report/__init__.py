"""Results for people: galleries of pictures."""
