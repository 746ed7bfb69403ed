"""Reading and writing encoders in the formats of others."""
